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
# # Any model
#
# lorajax has no layers of its own and wraps none. It traces a function of parameters and inputs, finds the weights
# that something multiplies, and evaluates the same trace on adapted weights. So it does not matter who wrote the
# model, or in which library: here are a Flax NNX model, a Flax Linen model, and a raw function with a recurrent loop
# that nobody wrote with adapters in mind.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import lorajax as lj

SMOKE = bool(os.environ.get("LORAJAX_SMOKE"))  # the form that the tests run
INK, ACCENT, PALE = "#34495e", "#c0392b", "#9fb3c8"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9})
rng = np.random.default_rng(0)
x = jnp.float32(rng.normal(size=(64, 12, 16)))  # 64 sequences of 12 steps and 16 features
y = jnp.sum(x[:, -3:, :2], axis=(1, 2)) - jnp.sum(x[:, :3, 2:4], axis=(1, 2))

# %% [markdown]
# ## One loop for all three
#
# Everything that follows knows of a model only that `apply(params, x)` gives a number for each sequence.


# %%
def finetune(apply, params, rules, steps=30 if SMOKE else 300):
    sites = lj.sites(apply, params, x)
    print(sites)
    adapt = lj.adapt(sites, rules)
    trainable, frozen = adapt.init(jax.random.key(0), params)
    lifted, tx = lj.lift(apply), optax.adam(1e-2)

    def step(carry, _):
        t, state = carry
        loss, grads = jax.value_and_grad(lambda t: jnp.mean(jnp.square(lifted(adapt.bind(t, frozen), x) - y)))(t)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(t, updates), state), loss

    (trained, _), losses = jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), length=steps))(trainable)
    merged = adapt.merge(trained, frozen)
    gap = float(jnp.abs(apply(merged, x) - lifted(adapt.bind(trained, frozen), x)).max())
    total = sum(a.size for a in jax.tree.leaves(params))
    print(f"\ntrained {adapt.count():,} of {total:,}; loss {losses[0]:.3f} -> {losses[-1]:.3f}; merged apart {gap:.1e}")
    assert losses[-1] < losses[0] and gap < 1e-3
    return np.asarray(losses), adapt.count(), total


# %% [markdown]
# ## Flax Linen
#
# Attention over the sequence, then a head. `apply` is already a function of parameters and inputs. The preset
# `attention` finds the projections by the dataflow, not by their names; the head's kernel is trained in full.


# %%
class Attending(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(16, name="embed")(x)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, name="mix")(h)
        return nn.Dense(1, name="score")(h.mean(1))[:, 0]


linen = Attending()
params = linen.init(jax.random.key(1), x)
curves = {"Linen, attention": finetune(linen.apply, params, [(".*score/kernel", lj.Full()),
                                                             ("attention", lj.LoRA(rank=2))])}

# %% [markdown]
# ## Flax NNX
#
# An NNX model is an object with state. `nnx.split` takes it apart into a graph and a state, and a state is a pytree:
# the function is one line. The model class does not change.


# %%
class Gated(nnx.Module):
    def __init__(self, rngs):
        self.up, self.gate = nnx.Linear(192, 32, rngs=rngs), nnx.Linear(192, 32, rngs=rngs)
        self.down = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        return self.down(nnx.silu(self.gate(x)) * self.up(x))[:, 0]


graph, state = nnx.split(Gated(nnx.Rngs(2)))


def nnx_apply(state, x):
    return nnx.merge(graph, state)(x)


curves["NNX, gated MLP"] = finetune(nnx_apply, state, [(".*(up|gate).*kernel", lj.LoRA(rank=2)),
                                                       (".*down.*", lj.Full())])

# %% [markdown]
# ## A raw function
#
# A recurrent network written with `lax.scan`, its weights in a dict with names of somebody's liking. The loop's body
# uses the same weights at every step; `lift` enters the loop, and the adapter's products are inside it too.


# %%
def recurrent(weights, x):
    def body(h, now):
        return jnp.tanh(h @ weights["hh"] + now @ weights["xh"]), None

    h, _ = jax.lax.scan(body, jnp.zeros((x.shape[0], 24)), x.swapaxes(0, 1))
    return h @ weights["out"]


weights = {"hh": jnp.float32(np.linalg.qr(rng.normal(size=(24, 24)))[0]),
           "xh": jnp.float32(rng.normal(size=(16, 24)) / 4), "out": jnp.float32(rng.normal(size=24) / 5)}
curves["raw, recurrent"] = finetune(recurrent, weights, [("hh|xh", lj.LoRA(rank=2)), ("out", lj.Full())])

# %% [markdown]
# ## Three libraries, one method

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.9), layout="constrained", width_ratios=(2, 1))
for (name, (losses, _, _)), color in zip(curves.items(), (INK, ACCENT, "#6a994e"), strict=True):
    left.semilogy(losses, color=color, label=name, linewidth=1.6)
left.set(title="loss while fine-tuning", xlabel="step")
left.legend(frameon=False)
shares = [100 * count / total for _, count, total in curves.values()]
right.barh(range(3), shares, color=[INK, ACCENT, "#6a994e"], height=0.5)
right.set(title="trained, % of all parameters", yticks=range(3))
right.set_yticklabels(list(curves))
right.invert_yaxis()

# %% [markdown]
# ## When a weight is used in a way that no rule knows
#
# Then there is no cheap path, and lorajax says so before anything runs: this function takes the sine of its weight.
# `lift` refuses in its strict form and names the weight, the operation and the line; without `strict` it forms the
# dense weight for this one operand, which is always right and never silent.


# %%
def odd(weights, x):
    return jnp.sin(weights["kernel"]).sum() * (x @ weights["kernel"])


kernel = {"kernel": jnp.float32(rng.normal(size=(16, 4)))}
strange = lj.adapt(lj.sites(odd, kernel, x), [("kernel", lj.LoRA(rank=2))])
bound = strange.bind(*strange.init(jax.random.key(0), kernel))
try:
    lj.lift(odd, strict=True)(bound, x)
except lj.StrictLiftError as error:
    print(str(error)[:400])
