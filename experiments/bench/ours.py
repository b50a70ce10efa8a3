"""lorajax's side of experiments.bench.speed: one row, timed in a process of its own.

    python -m experiments.bench.ours ROW [--file FILE] [--blocks 25]

The step is the library's (lorajax.train.step), the loss that of experiments.lm or experiments.glue, the optimizer
AdamW. Adapters are float32, as the library makes them; full fine-tuning is in the type of the weights, as PEFT's side
has it. A line of JSON for each way to run it, as soon as it is measured.
"""

import functools
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorajax as lj
from experiments import glue, objective
from experiments.bench import kernels
from experiments.bench import work as shared
from experiments.bench.setting import setting
from experiments.bench.work import ALPHA, RATE, ROWS, Work
from lorajax import config, language, optim, quant
from lorajax.data import TASKS
from lorajax.io.tensors import read_tensors
from lorajax.models import adapter_names, model_from_hf
from lorajax.models.short_attention import short_attention
from lorajax.shard.placement import LOCAL
from lorajax.train.step import init_state, make_step

# Options of XLA beside those that experiments.bench.speed sets for all. apart: only products smaller than 5 MiB of
# weights are put together, so the factors' and not Wq, Wk and Wv, whose sum with an update would then be a copy.
# graphs: a scan over steps is a CUDA graph too, not its steps alone.
COMPILERS: dict[str, dict[str, Any]] = {
    "": {}, "apart": {"xla_gpu_dot_merger_threshold_mb": "5"}, "triton": {"xla_gpu_enable_triton_gemm": "True"},
    "graphs": {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE"},
}  # fmt: skip


class Parts(NamedTuple):
    step: Any
    state: Any
    frozen: Any
    batch: Any
    trained: int
    loss: Any
    adapt: Any
    net: Any


def build(
    work: Work, attention: str = "", steps_per_call: int = 1, file: Path | None = None, layers: Sequence[str] = ()
) -> Parts:
    dtype: Any = jnp.float32 if work.device == "cpu" else jnp.bfloat16
    how = {"dtype": dtype, "param_dtype": dtype, "scan_layers": "scan" in layers}
    how |= {"remat": ("fused" if "fused" in layers else "full") if work.remat else "none"}
    how |= {"attention": {"short": short_attention}.get(attention, attention)} if attention else {}
    net: Any = model_from_hf(work.config, **how)
    given = work.batch()
    ids = jnp.asarray(given["input_ids"])
    shapes = jax.eval_shape(net.init, jax.random.key(0), ids[:1])
    if work.decoder:
        weight = jnp.ones(ids.shape).at[:, -1].set(0)  # the last token of a row has none to predict
        batch: Any = {"input_ids": ids, "labels": jnp.roll(ids, -1, 1), "weight": weight}
        inputs: Any = (ids,)
    else:
        batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "token_type_ids": jnp.zeros_like(ids),
                 "label": jnp.asarray(given["label"]), "weight": jnp.ones(work.rows)}
        inputs = glue.inputs(batch)
    sites = lj.sites(net.apply, shapes, *inputs)
    lora = lj.LoRA(rank=work.rank, alpha=ALPHA)
    methods: dict[str, Any] = {"full": lj.Full(), "dora": lj.variants.DoRA(lora), "lora": lora, "nf4": lora}
    rules = [] if work.decoder else [("params/classifier/.*", lj.Full())]
    rules += [(".*" if work.method == "full" else work.targets, methods[work.method])]
    adapt = lj.adapt(sites, rules, dtype=dtype if work.method == "full" else jnp.float32)

    names, real = adapter_names(net.config), read_tensors(file)[0] if file else {}
    place = quant.plan(sites, [("all-linear", quant.NF4() if work.method == "nf4" else None)]).place

    def tensor(path: str, like: Any) -> Any:
        named = names[path]
        shape, flip = like.shape[named.stacked :], named.form == "linear"

        def one(name: str) -> Any:
            if (x := real.get(name.removeprefix("bert."))) is not None:
                return jnp.asarray(x.T if flip else x, dtype)
            if shared.kind(name, len(shape)) == "ones":
                return jnp.ones(shape, dtype)
            return drawn(name, shape[::-1] if flip else shape, flip, dtype)

        found = [one(name) for name in named.names]
        return place(path, jnp.stack(found) if named.stacked else found[0])

    params = jax.tree.unflatten(sites.tree, [tensor(path, like) for path, like in sites.leaves.items()])
    if work.decoder and work.method in ("lora", "nf4"):  # drawn below
        trainable, frozen = dict(adapt.shapes[0]), adapt.frozen(params, {})
    else:  # not as one program, which compiles as long as the step
        trainable, frozen = adapt.init(jax.random.key(0), params)
    del params
    for path, adapter in trainable.items():
        named = names[path]

        def factor(leaf: str, named: Any = named, adapter: Any = adapter) -> jax.Array:
            shape = getattr(adapter, leaf).shape[named.stacked :][::-1]
            found = [drawn(f"{name.removesuffix('.weight')}.lora_{leaf}.weight", shape, True, dtype).astype(
                jnp.float32) for name in named.names]  # fmt: skip
            return jnp.stack(found) if named.stacked else found[0]

        trainable[path] = adapter._replace(**{leaf: factor(leaf) for leaf in ("A", "B") if leaf in adapter._fields})

    loss = make_loss(work, net, adapt, "" if "plain" in layers else "auto")
    tx = optim.adamw(RATE, weight_decay=0.01)
    step = make_step(loss, adapt, tx, clip=None, steps_per_call=steps_per_call)
    if steps_per_call > 1:
        batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps_per_call, *x.shape)), batch)
    return Parts(step, init_state(jax.random.key(0), trainable, tx), frozen, batch, adapt.count(trainable), loss,
                 adapt, net)


def make_loss(work: Work, net: Any, adapt: lj.Adapt, kernels: str = "") -> Any:
    c: Any = config.load("configs/lora.py")
    c.unlock()
    c.update(packing=False, kernels=kernels)
    if work.decoder:
        return objective.make_sft(c, language.Model(net, {}, (), None, None, "", "", "", LOCAL), adapt)
    return glue.make_loss(net, TASKS["sst2"], c)


def drawn(name: str, shape: tuple[int, ...], transposed: bool, dtype: Any) -> jax.Array:
    return _drawn(np.uint32(shared.seed(name)), shape, transposed, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(seed: jax.Array, shape: tuple[int, ...], transposed: bool, dtype: Any) -> jax.Array:
    index = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape)
    x = shared.drawn(index, seed, lambda h: h.astype(jnp.float32), np.uint32).astype(dtype)
    return x.T if transposed else x


def measure(
    work: Work, how: str, blocks: int, file: Path | None = None
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """What is told of this way to run the step, and what says where its time goes."""
    run, _, compiler = how.partition("+")
    run, _, steps = run.partition(":")
    attention, *layers = run.split("/")
    steps_per_call = int(steps or 1)
    step, state, frozen, batch, trained, *_ = build(work, attention, steps_per_call, file, layers)
    began = time.perf_counter()
    compiled: Any = step.lower(state, frozen, batch).compile(compiler_options=COMPILERS[compiler])
    compile_seconds = time.perf_counter() - began
    losses: list[float] = []
    norms: list[float] = []

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return metrics

    while len(losses) < 3:
        metrics = jax.device_get(call())
        losses += np.atleast_1d(metrics["loss"]).tolist()
        norms += np.atleast_1d(metrics["grad_norm"]).tolist()
    found = shared.timed(call, jax.block_until_ready, blocks, steps_per_call)
    m = compiled.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    # PEFT's side counts from the first step on; JAX's own count has the drawing of weights in it and cannot be reset.
    peak = held if work.device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found |= {"compile s": compile_seconds, "peak GiB": peak / 2**30, "step GiB": held / 2**30,
              "losses": losses[:3], "grad_norm": norms[0], "trained": trained}  # fmt: skip
    return found, functools.partial(kernels.where, call, steps_per_call)


def main(argv: list[str] | None = None) -> None:
    o = shared.options(__doc__, argv)
    hows, failed = list(ROWS[o.row].ours if o.how is None else o.how), 0
    file = ROWS[o.row].checkpoint(o.weights)
    for how in hows:
        begun, profile = time.perf_counter(), None
        line = {"side": "lorajax", "how": how, "checkpoint": file is not None, "setting": setting()}
        try:
            found, profile = measure(ROWS[o.row], how, o.blocks, file)
            shared.tell(o, line | found | {"seconds": time.perf_counter() - begun})
            if how == hows[0] or "/" in how or failed:  # of ways that differ in more than attention and calls
                shared.tell(o, line | {"profile": profile()})
        except Exception as error:  # one way may not work on this machine: the others count
            traceback.print_exc()
            shared.tell(o, line | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            failed += profile is None
            if failed == len(hows) and "" not in hows:
                hows.append("")  # without a fused kernel rather than not at all
        del profile
        jax.clear_caches()


if __name__ == "__main__":
    main()
