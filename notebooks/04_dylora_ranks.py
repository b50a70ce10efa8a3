# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One training, every rank
#
# Which rank? LoRA's answer is to train at 1, 2, 4, 8, ... and compare. DyLoRA (arXiv 2210.07558) trains once: in every
# step it draws a rank $b$ and uses only the first $b$ components. The components end up ordered by use, so that the
# adapter can be cut at any rank afterwards, like a sorted list.
#
# Here is one DyLoRA of rank 8, cut at each of its ranks, against eight LoRAs trained at these ranks one by one. "One by
# one" is a figure of speech: a LoRA of rank 3 is the same run inside arrays of rank 8 whose last five components are
# zero, so that all eight share a program and train side by side.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lorajax as lj
from lorajax import control
from lorajax.train.pack import Parts, make_packed_step, pack, unpack, widen
from lorajax.train.step import init_state, make_step

SMOKE = bool(os.environ.get("LORAJAX_SMOKE"))  # the form that the tests run
INK, ACCENT, PALE = "#34495e", "#c0392b", "#9fb3c8"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9})

# %% [markdown]
# ## A change whose components matter unequally
#
# A two-layer network has to follow a changed copy of itself. The change of each weight has eight components whose sizes
# halve every two: a higher rank always helps, and always by less.

# %%
n, hidden, outputs, batch, top, steps = 32, 64, 16, 128, 8, 100 if SMOKE else 1500
rng = np.random.default_rng(0)


def directions(size):
    return np.linalg.qr(rng.normal(size=(size, top)))[0]


base = {"up": jnp.float32(rng.normal(size=(n, hidden)) / np.sqrt(n)),
        "down": jnp.float32(rng.normal(size=(hidden, outputs)) / np.sqrt(hidden))}
sizes = 3.0 * 0.5 ** (np.arange(top) / 2)
target = {name: w + jnp.float32(directions(w.shape[0]) * sizes @ directions(w.shape[1]).T) for name, w in base.items()}


def network(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def batches(count, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, batch, n)).astype(np.float32)
    return {"x": x, "y": np.asarray(network(target, x))}


def loss(bound, batch, key):
    return jnp.mean(jnp.square(lj.lift(network)(bound, batch["x"]) - batch["y"])), {}


sites = lj.sites(network, base, batches(1)["x"][0])
data, test = batches(steps), jax.tree.map(lambda x: x[0], batches(1, seed=1))
tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
untouched = float(jnp.mean(jnp.square(network(base, test["x"]) - test["y"])))

# %% [markdown]
# ## One DyLoRA
#
# The controller draws the rank of each step and hands `bind` a mask. Two details of the paper are its options: `frozen`
# trains only the component at the drawn rank, and `strict` keeps an optimizer with momentum from moving the others.
# Without freezing, the first components are trained in every step.

# %%
adapt = lj.adapt(sites, [(".*", lj.LoRA(rank=top, alpha=float(top)))])
drawing = control.dylora(adapt, total_steps=steps, frozen=False, seed=0)
trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), base)
state = init_state(jax.random.key(1), trainable, tx, drawing)
step = make_step(loss, adapt, tx, drawing, steps_per_call=steps)
state, metrics = step(state, frozen, data)


@jax.jit
def score(trainable, masks):
    return loss(adapt.bind(trainable, frozen, masks=masks), test, None)[0]


ranks = list(range(1, top + 1))
one_run = [float(score(state.trainable, control.rank_masks(adapt, r))) for r in ranks]
print("test loss at ranks 1 to 8:", [f"{value:.3f}" for value in one_run])

# %% [markdown]
# ## Eight LoRAs, and a LoRA that is simply cut
#
# The eight share one program: `widen` fills their arrays up with zeros, which stay zeros. The third contestant costs
# nothing: the LoRA of rank 8, cut at lower ranks like the DyLoRA, though nobody taught it to be cut.


# %%
def parts(values):
    wide = lj.adapt(sites, [(".*", lj.LoRA(rank=top, alpha=float(top)))])
    return Parts(loss, wide, tx, control.identity())


members = []
for r in ranks:
    own = lj.adapt(sites, [(".*", lj.LoRA(rank=r, alpha=float(r)))])
    narrow, rest = own.init(jax.random.key(0), base)
    wide = {path: widen(narrow[path], own.plan[path].leaves, top) for path in narrow}
    members.append((init_state(jax.random.key(1), wide, tx), rest._replace(base=base), {}))
together = make_packed_step(parts, steps_per_call=steps)
packed, _ = together(pack(members), jax.tree.map(lambda x: np.stack([x] * top), data), jnp.ones(top, bool))


def first(r):  # a mask: the first r components
    return {path: jnp.float32(np.arange(top) < r) for path in base}


separate = [float(score(unpack(packed.state.trainable, r - 1), first(r))) for r in ranks]
cut = [float(score(unpack(packed.state.trainable, top - 1), first(r))) for r in ranks]

# %%
figure, ax = plt.subplots(figsize=(6, 3.3), layout="constrained")
ax.plot(ranks, separate, "o-", color=INK, label=f"{top} LoRAs, one for each rank")
ax.plot(ranks, one_run, "o--", color=ACCENT, label="one DyLoRA, cut at each rank")
ax.plot(ranks, cut, "o:", color=PALE, label="the LoRA of rank 8, cut")
ax.axhline(untouched, color="#999999", linewidth=0.8)
ax.text(top, untouched, "not adapted", ha="right", va="bottom", fontsize=8, color="#777777")
ax.set(xlabel="rank", ylabel="test loss", title="what one training gives at every rank", ylim=(0, None))
ax.legend(frameon=False, fontsize=8)

# %% [markdown]
# Nobody taught plain LoRA which component comes first, so what it loses when it is cut is a matter of luck. DyLoRA
# learned at every rank. What it pays for that is its distance to the LoRAs that were trained for one rank each; what
# it saves is seven trainings.
#
# ## Taking a rank along
#
# `truncate` makes plain LoRA of any of the ranks, with the same output as the mask. For a model: train
# `configs/dylora.py`, whose summary has the score at every rank, and the study `configs/studies/dylora_ranks.py`, which
# draws the first figure for a pretrained encoder.

# %%
small, arrays = control.truncate(adapt, state.trainable, 3)
there = float(loss(small.bind(arrays, frozen), test, None)[0])
print(f"rank 3: {there:.4f} as plain LoRA, {one_run[2]:.4f} under the mask; "
      f"{small.count():,} of {adapt.count():,} numbers")
assert abs(there - one_run[2]) < 1e-4 * untouched
