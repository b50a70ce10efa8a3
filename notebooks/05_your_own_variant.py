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
# # Your own variant
#
# A variant is a small file about one matrix. It says which arrays it has, how they begin, and what they multiply.
# Stacks of layers, optimizer groups, parameter counts, masks, `lift`, `merge` and files follow from that. This notebook
# writes one that no library has, checks it, and compares it with LoRA.
#
# The idea, for the sake of the example: LoRA's A starts random and drifts. We freeze a random A of orthonormal
# columns, and train B and a rotation-free scale per direction: $W' = W + A\,\mathrm{diag}(c)\,B$.

# %%
import os
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lorajax as lj
from lorajax.variants import DoRA

SMOKE = bool(os.environ.get("LORAJAX_SMOKE"))  # the form that the tests run
INK, ACCENT, PALE = "#34495e", "#c0392b", "#9fb3c8"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9})

# %% [markdown]
# ## The variant
#
# `leaves` is a table with a row for each array: its optimizer label, its axes, and whether it is trained. `factors`
# names what multiplies: here LoRA's two factors and one number per component.


# %%
class FramedAdapter(NamedTuple):
    A: jax.Array
    c: jax.Array
    B: jax.Array


@dataclass(frozen=True)
class Framed(lj.Variant):
    """``W' = W + A diag(c) B`` with a frozen orthonormal A. rank: r."""

    rank: int = 4
    leaves = {"A": lj.Leaf("a", ("in", "rank"), trainable=False), "c": lj.Leaf("gate", ("rank",)),
              "B": lj.Leaf("b", ("rank", "out"))}  # fmt: skip

    def init(self, key, w, stats=None):
        frame = jax.random.orthogonal(key, w.shape[0])[:, :self.rank]
        return FramedAdapter(frame, jnp.ones(self.rank), jnp.zeros((self.rank, w.shape[1]))), w

    def factors(self, adapter, w):
        return lj.Factors(a=adapter.A, b=adapter.B, e=adapter.c)


# %% [markdown]
# ## What follows from the table
#
# A model of three layers scanned over a stack, and a head. Nobody told the variant about stacks.

# %%
width, layers = 24, 3
rng = np.random.default_rng(0)
base = {"stack": jnp.float32(rng.normal(size=(layers, width, width)) / np.sqrt(width)),
        "head": jnp.float32(rng.normal(size=(width, 4)) / np.sqrt(width))}


def network(params, x):
    x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["stack"])
    return x @ params["head"]


x = jnp.float32(rng.normal(size=(256, width)))
sites = lj.sites(network, base, x)
adapt = lj.adapt(sites, [("stack", Framed(rank=4))])
trainable, frozen = adapt.init(jax.random.key(0), base)
print(adapt)
print("trained:", {name: x.shape for name, x in trainable["stack"]._asdict().items() if x is not None})
print("labels: ", adapt.labels["stack"])

# %% [markdown]
# ## Three checks that every variant has to pass
#
# It begins as the base. The lifted function and the merged weights agree, also far from the start. And the gradient
# reaches every array that is trained. (`docs/adding_a_variant.md` shows the conformance table, which runs these and
# many more on a new row.)

# %%
lifted = lj.lift(network)
noisy = jax.tree.map(lambda a: a + 0.3 * jnp.float32(rng.normal(size=a.shape)), trainable)
start = float(jnp.abs(lifted(adapt.bind(trainable, frozen), x) - network(base, x)).max())
apart = float(jnp.abs(lifted(adapt.bind(noisy, frozen), x) - network(adapt.merge(noisy, frozen), x)).max())
grads = jax.grad(lambda t: jnp.sum(jnp.square(lifted(adapt.bind(t, frozen), x))))(noisy)
reached = all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))
print(f"at the start {start:.1e}; lifted against merged {apart:.1e}; gradient everywhere: {reached}")
assert start == 0 and apart < 1e-3 and reached

# %% [markdown]
# ## Against LoRA, and inside DoRA
#
# The same task for all: follow a copy of the network whose stack was changed by matrices of rank 4. `DoRA(of=...)`
# wraps any additive variant, so ours too. As elsewhere a method may want a learning rate of its own, so each gets
# three.

# %%
change = rng.normal(size=(layers, width, 4)) @ rng.normal(size=(layers, 4, width)) / width
target = {**base, "stack": base["stack"] + jnp.float32(change)}
y = network(target, x)
steps = 40 if SMOKE else 600
methods = {"LoRA": lj.LoRA(rank=4, alpha=4.0), "Framed": Framed(rank=4), "DoRA of Framed": DoRA(of=Framed(rank=4))}
if SMOKE:
    del methods["LoRA"]


def train(variant):
    adapt = lj.adapt(sites, [("stack", variant)])
    trainable, frozen = adapt.init(jax.random.key(0), base)

    @jax.jit
    @jax.vmap
    def run(lr):
        tx = optax.adam(lr)

        def step(carry, _):
            t, state = carry
            loss, grads = jax.value_and_grad(lambda t: jnp.mean(jnp.square(lifted(adapt.bind(t, frozen), x) - y)))(t)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(t, updates), state), loss

        return jax.lax.scan(step, (trainable, tx.init(trainable)), length=steps)[1]

    return np.asarray(run(jnp.float32([3e-3, 1e-2, 3e-2]))), adapt.count()


curves = {name: train(variant) for name, variant in methods.items()}

# %%
figure, ax = plt.subplots(figsize=(6, 3.1), layout="constrained")
for (name, (losses, count)), color in zip(curves.items(), (PALE, ACCENT, INK), strict=False):
    best = losses[np.argmin(losses[:, -1])]
    ax.semilogy(best, color=color, linewidth=1.8, label=f"{name}: {count:,} trained, {best[-1]:.2g}")
ax.set(xlabel="step", title="loss, each method at the best of three rates")
ax.legend(frameon=False)

# %% [markdown]
# Framed cannot choose the directions that it reads, so it trains fewer numbers and gets less far: a small lesson on why
# LoRA trains both factors, found in a page of code. For a real comparison put the file into `lorajax/variants/`, a row
# in its table of names, a row in the conformance table and a config, and add a line to `configs/studies/fair_glue.py`.
