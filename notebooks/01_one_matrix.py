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
# # One matrix
#
# Low-rank adaptation is one line of algebra. A pretrained weight $W$ stays as it is, and beside it two thin matrices
# are trained:
#
# $$ y = x W + s\,(x A) B, \qquad A \in \mathbb{R}^{n \times r},\; B \in \mathbb{R}^{r \times m},\; s = \alpha / r . $$
#
# We write this by hand for a single matrix, then let lorajax do it, and look at what `lift` changes in the program
# that XLA gets. The question to keep in mind is not whether the formula is right, but what it *costs*: written
# carelessly, the adapted layer is more expensive than the layer itself.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lorajax as lj

SMOKE = bool(os.environ.get("LORAJAX_SMOKE"))  # the form that the tests run
INK, ACCENT, PALE = "#34495e", "#c0392b", "#9fb3c8"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9})

# %% [markdown]
# ## A task that a low rank can do
#
# The weight has 64 inputs and 48 outputs. The data come from the same weight plus an update of rank 3: that is what
# adaptation has to find, and because we made it ourselves we can say afterwards whether it was found.

# %%
n, m, true_rank, rank, alpha = 64, 48, 3, 8, 16.0
rng = np.random.default_rng(0)
W = rng.normal(size=(n, m)).astype(np.float32) / np.sqrt(n)
update = sum(size * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v)) for size, u, v in
             [(s, rng.normal(size=n), rng.normal(size=m)) for s in (2.0, 1.2, 0.7)]).astype(np.float32)  # fmt: skip
x = rng.normal(size=(256, n)).astype(np.float32)
y = x @ (W + update) + 0.05 * rng.normal(size=(256, m)).astype(np.float32)

# %% [markdown]
# ## By hand
#
# A starts random and B at zero, so the adapted function begins as the pretrained one, exactly. The order of the
# brackets is the whole trick: $(xA)B$ costs $r(n+m)$ multiplications for each row of $x$, $x(AB)$ first costs $n m r$
# for the product and then another $n m$.


# %%
def by_hand(W, A, B, x):
    return x @ W + (alpha / rank) * (x @ A) @ B


A0 = rng.uniform(-1, 1, size=(n, rank)).astype(np.float32) / np.sqrt(n)
print("at the start the update is", np.abs(by_hand(W, A0, np.zeros((rank, m), np.float32), x) - x @ W).max())

# %% [markdown]
# ## By lorajax
#
# The model is any function of `(params, inputs)`. `sites` traces it once and lists the weights that something consumes;
# `adapt` says which of them get what; `lift` returns the same function, which now also takes *bound* parameters.


# %%
def model(params, x):
    return x @ params["kernel"]


params = {"kernel": jnp.asarray(W)}
sites = lj.sites(model, params, x)
print(sites)

# %%
adapt = lj.adapt(sites, [("kernel", lj.LoRA(rank=rank, alpha=alpha))])
trainable, frozen = adapt.init(jax.random.key(0), params)
lifted = lj.lift(model)
print(adapt)

A, B = trainable["kernel"].A, rng.normal(size=(rank, m)).astype(np.float32)
bound = adapt.bind({"kernel": trainable["kernel"]._replace(B=B)}, frozen)
difference = np.abs(lifted(bound, x) - by_hand(W, np.asarray(A), B, x)).max()
print(f"lifted against by hand, largest difference: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# ## What lift does to the program
#
# Nothing in `model` knows of adapters: it multiplies `x` by something called `kernel`. `lift` evaluates the traced
# program equation by equation, and where a matrix product meets a bound weight, it puts two thin products beside it.
# There is no equation that makes an array of 64 x 48 out of A and B. Here are the products of the lifted function:

# %%
program = jax.make_jaxpr(lifted)(bound, x)


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.shape for v in (*equation.invars, *equation.outvars))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products(getattr(inner, "jaxpr", inner))


for left, right, out in products(program.jaxpr):
    print(f"{left!s:>10} @ {right!s:<9} -> {out}")
assert not any(out == (n, m) for *_, out in products(program.jaxpr))

# %% [markdown]
# ## Training it
#
# `trainable` is a plain pytree, so any optax transformation will do. The loss sees only the lifted function.

# %%
tx = optax.adam(2e-2)


@jax.jit
def train(trainable):
    def step(carry, _):
        trainable, state = carry
        loss, grads = jax.value_and_grad(
            lambda t: jnp.mean(jnp.square(lifted(adapt.bind(t, frozen), x) - y)))(trainable)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(trainable, updates), state), loss

    return jax.lax.scan(step, (trainable, tx.init(trainable)), length=300)


(trained, _), losses = train(trainable)
learned = np.asarray(adapt.merge(trained, frozen)["kernel"]) - W
print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}; the noise alone is {0.05**2:.4f}")
assert losses[-1] < 0.02 * losses[0]

# %% [markdown]
# The adapter was allowed rank 8 and the truth has rank 3. The singular values of what it learned say how much of the
# allowance it used: three directions stand out with the right sizes, the other five hold noise.

# %%
found, truth = (np.linalg.svd(matrix, compute_uv=False)[:12] for matrix in (learned, update))
figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 2.9), layout="constrained")
left.semilogy(losses, color=INK)
left.axhline(0.05**2, color=ACCENT, linewidth=0.9, linestyle="--")
left.text(len(losses), 0.05**2 * 1.2, "noise", color=ACCENT, ha="right")
left.set(title="loss", xlabel="step")
right.bar(np.arange(1, 13) - 0.2, truth, 0.4, color=PALE, label="the true update")
right.bar(np.arange(1, 13) + 0.2, found, 0.4, color=INK, label="what LoRA learned")
right.axvline(rank + 0.5, color=ACCENT, linewidth=0.9, linestyle="--")
right.set(title="singular values", xlabel="number", xticks=range(1, 13))
right.legend(frameon=False)

# %% [markdown]
# ## What it costs
#
# The alternative is to form $W + sAB$ and call the model on it. It is the same function, and automatic differentiation
# makes the gradient of a full matrix on the way. XLA counts the multiplications of forward and backward pass; 1.0 is
# the cost with respect to the inputs alone, which no method can avoid.

# %%
ranks = [1, 8] if SMOKE else [1, 2, 4, 8, 16, 32]
tokens = 64


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def two_layers(params, x):  # the second has an activation below it, whose gradient is needed
    return jnp.sum(jnp.square(jnp.tanh(x @ params["one"]) @ params["two"]))


big = {name: jnp.zeros((256, 256), jnp.float32) for name in ("one", "two")}
inputs = jnp.zeros((tokens, 256), jnp.float32)
least = flops(jax.value_and_grad(two_layers, argnums=1), big, inputs)
ratios = {"lifted": [], "W + AB": []}
for r in ranks:
    choice = lj.adapt(lj.sites(two_layers, big, inputs), [(".*", lj.LoRA(rank=r))])
    small, rest = choice.init(jax.random.key(0), big)
    ways = {"lifted": lambda t, x, c=choice, rest=rest: lj.lift(two_layers)(c.bind(t, rest), x),
            "W + AB": lambda t, x, c=choice, rest=rest: two_layers(c.merge(t, rest), x)}
    for name, way in ways.items():
        ratios[name].append(flops(jax.value_and_grad(way, argnums=(0, 1)), small, inputs) / least)

figure, ax = plt.subplots(figsize=(5.2, 2.9), layout="constrained")
for (name, row), color in zip(ratios.items(), (INK, ACCENT), strict=True):
    ax.plot(ranks, row, "o-", color=color)
    ax.text(ranks[-1] * 1.08, row[-1], name, color=color, va="center")
ax.axhline(1, color=PALE, linewidth=1)
ax.set_xscale("log", base=2)
ax.set_xticks(ranks, [str(r) for r in ranks])
ax.set(xlabel="rank", title=f"multiplications of forward and backward, two layers of 256, {tokens} tokens")

# %% [markdown]
# The lifted cost grows with the rank and starts next to 1; the materialised one begins high, because a full matrix of
# gradients is computed before it is projected onto A and B. With few tokens and wide weights the gap widens: the README
# has the counts for encoders.
#
# When training is over, `merge` folds the update into a plain array once, and deployment knows nothing of all this.

# %%
assert ratios["lifted"][0] < ratios["W + AB"][0]
print({name: [round(float(r), 2) for r in row] for name, row in ratios.items()})
