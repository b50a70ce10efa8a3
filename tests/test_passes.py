"""What an adapter adds to a step beside its own products: no pass over activations that could be avoided."""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from core import jaxprs

import lorajax as lj
from lorajax.models import Llama, LlamaConfig

IDS = jnp.zeros((4, 64), jnp.int32)
WIDE = 64
NET = Llama(LlamaConfig(vocab_size=64, hidden_size=WIDE, intermediate_size=128, num_layers=2, num_heads=2,
                        num_kv_heads=2, head_dim=32, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
                        tie_embeddings=False))  # fmt: skip


def passes(fn: Any, *args: Any) -> Counter[str]:
    """Operations whose result is as large as the activations, by name."""
    with jax.numpy_dtype_promotion("standard"):
        trace = jaxprs.trace(jax.value_and_grad(fn), *args)
    return Counter(e.primitive.name for e in jaxprs.equations(trace) if e.outvars[0].aval.size >= IDS.size * WIDE)


def test_an_adapted_product_adds_two_products_and_two_sums() -> None:
    """x A B and its gradient by x, each added once: no cast, no transposition, no scaling, no dropout of activations.
    The gradient by x A, A and B is smaller than these, and nothing below the first layer's query, key and value wants
    one by x."""
    shapes = jax.eval_shape(NET.init, jax.random.key(0), IDS)
    norm = shapes["params"]["layer_0"]["attention_norm"]["scale"]

    def plain(scale: jax.Array, params: Any) -> jax.Array:
        first = {**params["params"]["layer_0"], "attention_norm": {"scale": scale}}
        return jnp.square(NET.apply({"params": {**params["params"], "layer_0": first}}, IDS)).mean()

    adapt = lj.adapt(lj.sites(NET.apply, shapes, IDS), [("all-linear", lj.LoRA(rank=8))])
    run = lj.lift(NET.apply, strict=True)
    base = passes(plain, norm, shapes)
    ours = passes(lambda t, f: jnp.square(run(adapt.bind(t, f), IDS)).mean(), *adapt.shapes)
    sites = len(adapt.plan)
    assert sites == 14
    # Forward a product with B for each weight, back one with A for each input that weights read: four a layer, but for
    # the first layer's query, key and value. `plain` differentiates by the first norm's scale, for which it needs dx of
    # these three.
    assert ours["dot_general"] - base["dot_general"] == sites + 7 - 3
    assert ours["add"] - base["add"] == sites
    for name in ("convert_element_type", "transpose", "mul", "select_n", "broadcast_in_dim"):
        assert ours[name] <= base[name], name


def test_gradients_of_adapters_sum_over_one_dimension() -> None:
    """Rows and tokens as one, also where x A of query, key and value is one product: over two, under a vmap over runs,
    XLA's GPU compiler takes the sum from a copy of the activations in another layout."""
    ids = IDS[:3, :50]
    shapes = jax.eval_shape(NET.init, jax.random.key(0), ids)
    adapt = lj.adapt(lj.sites(NET.apply, shapes, ids), [("all-linear", lj.LoRA(rank=8))])
    run = lj.lift(NET.apply, strict=True)
    trainable, frozen = adapt.shapes
    runs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), trainable)
    with jax.numpy_dtype_promotion("standard"):
        trace = jaxprs.trace(jax.vmap(jax.grad(lambda t, f: run(adapt.bind(t, f), ids).sum()), (0, None)), runs, frozen)
    summed = []
    for e in jaxprs.equations(trace):
        if e.primitive.name == "dot_general":
            dims = e.params["dimension_numbers"][0][0]
            if math.prod(e.invars[0].aval.shape[i] for i in dims) == ids.size:
                summed.append(len(dims))
    assert summed == [1] * (14 + 8)  # of every B, and of A's by what they read
