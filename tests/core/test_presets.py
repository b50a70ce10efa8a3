"""Named targets on four models that share no names: each preset takes the weights of its role, no head, no norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lorajax as lj

from .case import fill, normal
from .models_nnx import nnx_model
from .probe import Probe


def encoder() -> tuple[Any, Any, Any, dict[str, set[str]]]:
    """Linen, post-norm, MultiHeadDotProductAttention, position embeddings, first-token pooling and a classifier."""
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = nn.Embed(23, 8, name="tok")(tokens) + nn.Embed(9, 8, name="pos")(jnp.arange(tokens.shape[1]))[None]
            x = nn.LayerNorm(name="norm")(x)
            for i in range(2):
                y = nn.MultiHeadDotProductAttention(2, name=f"attn_{i}")(x, x, mask=(tokens > 0)[:, None, None, :])
                x = nn.LayerNorm(name=f"norm_a_{i}")(x + y)
                y = nn.Dense(8, name=f"wide_out_{i}")(nn.gelu(nn.Dense(20, name=f"wide_in_{i}")(x)))
                x = nn.LayerNorm(name=f"norm_b_{i}")(x + y)
            return nn.Dense(3, name="classifier")(x[:, 0])

    model, tokens = Encoder(), jnp.ones((2, 7), jnp.int32)
    params = fill(jax.eval_shape(model.init, jax.random.key(0), tokens))
    layers = range(2)
    attention = {name: {f"params/attn_{i}/{name}/kernel" for i in layers} for name in ("query", "key", "value", "out")}
    return model.apply, params, (tokens,), {
        "qv": attention["query"] | attention["value"],
        "attention": set().union(*attention.values()),
        "ffn": {f"params/wide_{side}_{i}/kernel" for side in ("in", "out") for i in layers},
        "embeddings": {"params/tok/embedding", "params/pos/embedding"},
    }


def transformer() -> tuple[Any, Any, Any, dict[str, set[str]]]:
    """NNX, pre-norm, scanned stack, untied language-model head."""
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.n1, self.n2 = nnx.LayerNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)
            self.mixer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.fc1, self.fc2 = nnx.Linear(8, 20, rngs=rngs), nnx.Linear(20, 8, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.mixer(self.n1(x), mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.fc2(nnx.relu(self.fc1(self.n2(x))))

    class Transformer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> Layer:
                return Layer(rngs)

            self.embed, self.layers = nnx.Embed(23, 8, rngs=rngs), make(rngs)
            self.norm, self.head = nnx.RMSNorm(8, rngs=rngs), nnx.Linear(8, 23, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x: jax.Array, layer: Layer) -> jax.Array:
                return layer(x)

            return self.head(self.norm(run(self.embed(tokens), self.layers)))

    fn, params, args, _ = nnx_model(Transformer, jnp.ones((2, 7), jnp.int32))
    attention = {name: {f"layers/mixer/{name}/kernel"} for name in ("query", "key", "value", "out")}
    return fn, params, args, {
        "qv": attention["query"] | attention["value"],
        "attention": set().union(*attention.values()),
        "ffn": {"layers/fc1/kernel", "layers/fc2/kernel"},
        "embeddings": {"embed/embedding"},
    }


def decoder(names: dict[str, str]) -> tuple[Any, Any, Any, dict[str, set[str]]]:
    """Raw JAX: grouped-query attention, rotary positions, RMS norms, gated MLP, separate head. `names`: role -> key."""
    n = names

    def rms(x: jax.Array, g: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * g[None, None]

    def rotary(x: jax.Array) -> jax.Array:
        angle = np.arange(x.shape[1], dtype=np.float32)[:, None] * np.array([1.0, 0.1], np.float32)[None]
        cos, sin = (jnp.asarray(f(angle))[None, :, None] for f in (np.cos, np.sin))
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        x = p[n["embed"]][tokens]
        b, t, _ = x.shape
        for layer in p["layers"]:
            h = rms(x, layer[n["norm1"]])
            q = rotary((h @ layer[n["q"]]).reshape(b, t, 4, 4))
            k, v = (f((h @ layer[n[i]]).reshape(b, t, 2, 4)) for f, i in ((rotary, "k"), (lambda v: v, "v")))
            k, v = (jnp.repeat(s, 2, axis=2) for s in (k, v))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
            scores = jnp.where(np.tril(np.ones((t, t), bool))[None, None], scores, -1e9)
            y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, t, 16)
            x = x + y @ layer[n["o"]]
            h = rms(x, layer[n["norm2"]])
            x = x + (jax.nn.silu(h @ layer[n["gate"]]) * (h @ layer[n["up"]])) @ layer[n["down"]]
        return rms(x, p[n["norm"]]) @ p[n["head"]]

    shapes = {"norm1": (8,), "norm2": (8,), "q": (8, 16), "k": (8, 8), "v": (8, 8), "o": (16, 8), "gate": (8, 20),
              "up": (8, 20), "down": (20, 8)}
    layers = [{n[role]: normal(*shape, seed=i) for role, shape in shapes.items()} for i in range(2)]
    params = {"layers": layers, n["embed"]: normal(23, 8), n["norm"]: normal(8), n["head"]: normal(8, 23)}

    def path(*roles: str) -> set[str]:
        return {f"layers/{i}/{n[role]}" for i in range(2) for role in roles}

    return fn, params, (jnp.ones((2, 7), jnp.int32),), {
        "qv": path("q", "v"), "attention": path("q", "k", "v", "o"), "ffn": path("gate", "up", "down"),
        "embeddings": {n["embed"]},
    }


ROLES = ("embed", "norm", "head", "norm1", "norm2", "q", "k", "v", "o", "gate", "up", "down")
MODELS = {
    "linen_encoder": encoder,
    "nnx_transformer": transformer,
    "raw_decoder": lambda: decoder({role: role for role in ROLES} | {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}),
    "meaningless_names": lambda: decoder({role: f"w{i}" for i, role in enumerate(ROLES)}),
}


@pytest.mark.parametrize("preset", ["qv", "attention", "ffn", "all-linear", "embeddings"])
@pytest.mark.parametrize("model", MODELS)
def test_presets(model: str, preset: str):
    """Exactly the weights of that role; the head, the norms and the biases in none."""
    fn, params, args, expected = MODELS[model]()
    expected["all-linear"] = expected["attention"] | expected["ffn"]
    adapt = lj.adapt(lj.sites(fn, params, *args), [(preset, Probe(rank=2))])
    assert set(adapt.plan) == expected[preset]


def test_misleading_names_do_not_matter():
    """The value projection is called `query`, the head is called `mlp`: the trace knows better."""
    swapped = {role: role for role in ROLES} | {"q": "k", "k": "v", "v": "q", "head": "up", "up": "head"}
    fn, params, args, expected = decoder(swapped)
    sites = lj.sites(fn, params, *args)
    for preset in ("qv", "ffn"):
        assert set(lj.adapt(sites, [(preset, Probe(rank=2))]).plan) == expected[preset]


def test_a_preset_that_finds_nothing_says_so():
    sites = lj.sites(lambda p, x: x @ p["w"], {"w": normal(8, 12)}, normal(5, 8))
    with pytest.raises(ValueError, match="qv"):
        lj.adapt(sites, [("qv", Probe())])
