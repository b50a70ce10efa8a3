"""A decoder's training step for the benchmarks: random weights of a real shape, drawn on the device; AdamW."""

import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorajax as lj
from experiments.bench.quant import SHAPES
from lorajax.models import Llama, LlamaConfig
from lorajax.models.frozen_head import frozen_head_loss
from lorajax.train.footprint import bytes_of
from lorajax.train.step import init_state, make_step


class Case(NamedTuple):
    """shape: a row of SHAPES."""

    shape: str
    batch: int
    tokens: int
    variant: Any
    targets: str = "all-linear"
    remat: str = "none"
    scan: bool = False
    steps_per_call: int = 1


class Built(NamedTuple):
    step: Any  # jitted
    state: Any
    frozen: Any
    batch: Any


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) / np.sqrt(shape[-2])).astype(dtype)


def weights(case: Case) -> Any:
    net = model(case)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    flat, tree = jax.tree.flatten(shapes)
    made = [drawn(jax.random.fold_in(jax.random.key(1), i), x.shape, x.dtype) for i, x in enumerate(flat)]
    return jax.tree.unflatten(tree, made)


def model(case: Case) -> Llama:
    gpu = jax.default_backend() == "gpu"
    kind: Any = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return Llama(LlamaConfig(**SHAPES[case.shape], tie_embeddings=False, dtype=kind, param_dtype=kind, remat=case.remat,
                             scan_layers=case.scan, attention="cudnn" if gpu else None))  # fmt: skip


def build(case: Case, params: Any) -> Built:
    net = model(case)
    hidden = lj.lift(lambda params, ids: net.apply(params, ids, method="hidden"), strict=True)
    rows = (case.steps_per_call, case.batch, case.tokens)[case.steps_per_call == 1 :]
    ids = jnp.asarray(np.random.default_rng(0).integers(0, SHAPES[case.shape]["vocab_size"], rows), jnp.int32)
    one = ids[0] if case.steps_per_call > 1 else ids
    adapt = lj.adapt(lj.sites(net.apply, params, one), [(case.targets, case.variant)])
    trainable, frozen = adapt.init(jax.random.key(2), params)  # as one program it compiles as long as the step
    tx = optax.adamw(1e-4)

    def loss(bound: Any, ids: jax.Array, key: jax.Array) -> Any:
        x = hidden(bound, ids)
        weight = jnp.ones(ids.shape).at[:, -1].set(0.0)
        return frozen_head_loss(x, bound["params"]["head"]["kernel"], jnp.roll(ids, -1, 1), weight), {}

    step = make_step(loss, adapt, tx, steps_per_call=case.steps_per_call)
    return Built(step, init_state(jax.random.key(3), trainable, tx), frozen, ids)


def timed(built: Built, steps: int) -> dict[str, Any]:
    """Of one optimizer step: median, fastest and slowest of `steps` calls that are waited for, and the mean of calls
    that are not; bytes by XLA; seconds to compile; the loss of the last step."""
    began = time.perf_counter()
    with jax.numpy_dtype_promotion("standard"):
        compiled = built.step.lower(built.state, built.frozen, built.batch).compile()
    seconds, state, each = time.perf_counter() - began, built.state, []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        state, metrics = compiled(state, built.frozen, built.batch)
        jax.block_until_ready(metrics)
        each.append(1e3 * (time.perf_counter() - begun))
    begun = time.perf_counter()
    for _ in range(steps):
        state, metrics = compiled(state, built.frozen, built.batch)
    jax.block_until_ready(metrics)
    flowing = 1e3 * (time.perf_counter() - begun) / steps
    n = metrics["loss"].size
    return {"ms": statistics.median(each[2:]) / n, "min": min(each[2:]) / n, "max": max(each[2:]) / n,
            "ms unwaited": flowing / n, "GiB": bytes_of(compiled) / 2**30, "compile s": seconds,
            "loss": float(np.ravel(metrics["loss"])[-1])}  # fmt: skip
