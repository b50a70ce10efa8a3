"""What a quantised base costs: the compiled memory and the time of a training step, against the same base in bfloat16;
and how far NF4, LoftQ and QPiSSA are from a model's own weights.

    python -m experiments.bench.quant                       # 1.2 billion parameters, 8 x 1024 tokens: for one GPU
    python -m experiments.bench.quant --shape 8b --batch 2 --tokens 2048 --remat full
    python -m experiments.bench.quant --shape tiny --steps 2
    python -m experiments.bench.quant --errors minilm [--layers 2] [--rank 16]

Weights are drawn at random, on the device, and quantised there. Bytes are XLA's: arguments and temporaries of the step,
whose results take the place of its arguments. NF4 with double quantisation; LoRA of rank 16 on all linear; AdamW.
"""

import argparse
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorajax as lj
from experiments.bench.setting import markdown, setting
from lorajax import quant
from lorajax.core.packed import is_packed, unpacked
from lorajax.core.sites import by_path
from lorajax.models import Llama, LlamaConfig

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2,
             "num_kv_heads": 2, "head_dim": 32},
    "1.2b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32,
             "num_kv_heads": 8, "head_dim": 64},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32,
           "num_kv_heads": 8, "head_dim": 128},
}  # fmt: skip
FORMATS = {"bfloat16": None, "nf4": quant.NF4()}


def measure(shape: str, batch: int, tokens: int, remat: str, scan: bool, steps: int) -> list[dict[str, Any]]:
    net = Llama(LlamaConfig(**SHAPES[shape], tie_embeddings=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
                            remat=remat, scan_layers=scan))  # fmt: skip
    ids = jnp.asarray(np.random.default_rng(0).integers(0, SHAPES[shape]["vocab_size"], (batch, tokens)), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), ids[:1, :2])
    sites = lj.sites(net.apply, shapes, ids)
    adapt, tx = lj.adapt(sites, [("all-linear", lj.LoRA(rank=16))]), optax.adamw(1e-4)
    lifted = lj.lift(net.apply, strict=True)

    def loss(trainable: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        logits = lifted(adapt.bind(trainable, frozen), ids).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    def step(trainable: Any, state: Any, frozen: Any, ids: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(trainable, frozen, ids)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    rows = []
    for name, form in FORMATS.items():
        plan = quant.plan(sites, [("all-linear", form)])
        # One weight at a time: a large model in 16 bits need not fit beside its codes.
        params = jax.tree.unflatten(sites.tree, [
            plan.place(path, drawn(jax.random.fold_in(jax.random.key(1), i), like.shape))
            for i, (path, like) in enumerate(sites.leaves.items())])  # fmt: skip
        trainable, frozen = jax.jit(adapt.init)(jax.random.key(2), params)
        state = jax.jit(tx.init)(trainable)
        began = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(trainable, state, frozen, ids).compile()
        compile_seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
        times = []
        for _ in range(steps + 2):
            began = time.perf_counter()
            trainable, state, value = compiled(trainable, state, frozen, ids)
            jax.block_until_ready(value)
            times.append(time.perf_counter() - began)
        held = sum(w.nbytes for w in by_path(params)[0].values())
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # type: ignore[union-attr]
        rows.append({"base": name, "base GiB": held / 2**30, "arguments and temporaries GiB": peak / 2**30,
                     "ms a step": 1e3 * float(np.median(times[2:])), "compile s": compile_seconds,
                     "loss": float(value)})  # fmt: skip
        del params, trainable, frozen, state, compiled
    ratio = rows[1]["ms a step"] / rows[0]["ms a step"]
    for row, own in zip(rows, (1.0, ratio), strict=True):
        row["time over bfloat16"] = own
    return rows


@functools.partial(jax.jit, static_argnums=1)
def drawn(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if len(shape) < 2:
        return jnp.ones(shape)
    return jax.random.normal(key, shape, jnp.float32) / np.sqrt(shape[-2])


def errors(model: str, layers: int, rank: int) -> list[dict[str, Any]]:
    # ||W - (Q + s A B)|| / ||W|| over the linear weights of the first layers, together.
    from ml_collections import ConfigDict

    from lorajax import build, config, language
    from lorajax.data import TASKS

    if model == "smollm2":
        c = config.load("configs/qlora.py")
        c.quant.format, c.compute_dtype = "", "float32"
        loaded: Any = language.load_model(c)
        ids: Any = (jnp.zeros((1, 8), jnp.int32),)
    else:
        c = ConfigDict(config.load(f"configs/lora.py:model={model}").to_dict())
        loaded = build.load_model(c, TASKS["sst2"], jax.random.key(0))
        ids = (jnp.zeros((1, 8), jnp.int32),) * 3
    sites = lj.sites(loaded.net.apply, loaded.variables, *ids)
    first = re.compile(rf".*layer_({'|'.join(map(str, range(layers)))})/.*")
    wanted = "|".join(re.escape(path) for path, site in sites.items()
                      if site.op == "matmul" and "head" not in site.roles and first.fullmatch(path))
    original = by_path(loaded.variables)[0]
    plan = quant.plan(sites, [(wanted, quant.NF4(double=False))])
    rows = []
    starts: dict[str, Any] = {"NF4": lj.LoRA(rank=rank, alpha=rank)}
    for name in ("loftq", "qpissa"):
        cls: Any = lj.variants.INITIALIZERS[name]
        starts |= {f"{cls.__name__}, T={t}": lj.LoRA(rank=rank, alpha=rank, initializer=cls(t)) for t in (1, 5)}
    for name, variant in starts.items():
        adapt = lj.adapt(sites, [(wanted, variant)])
        base, made = plan.start(adapt, loaded.variables)
        trainable, frozen = adapt.init(jax.random.key(0), base, made)
        merged = by_path(adapt.merge(trainable, frozen))[0]
        square = lambda x: float(jnp.sum(jnp.square(x.astype(jnp.float32))))  # noqa: E731
        off = sum(square(merged[path] - original[path]) for path in plan.rows)
        rows.append({"start": name, "error": (off / sum(square(original[path]) for path in plan.rows)) ** 0.5})
        rows[-1]["of NF4's"] = rows[-1]["error"] / rows[0]["error"]
    double = quant.plan(sites, [(wanted, quant.NF4())]).quantize(loaded.variables)
    leaves = {path: unpacked(w) for path, w in by_path(double)[0].items() if is_packed(w)}
    off = sum(float(jnp.sum(jnp.square(w - original[path]))) for path, w in leaves.items())
    whole = sum(float(jnp.sum(jnp.square(original[path]))) for path in leaves)
    error = (off / whole) ** 0.5
    return [*rows, {"start": "NF4, double", "error": error, "of NF4's": error / rows[0]["error"]}]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.2b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--errors", choices=("minilm", "smollm2"), help="the table of errors in place of a step")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    o = parser.parse_args(argv)
    if o.errors:
        rows = errors(o.errors, o.layers, o.rank)
    else:
        rows = measure(o.shape, o.batch, o.tokens, o.remat, o.scan, o.steps)
    print(markdown(rows, setting()))
    return rows


if __name__ == "__main__":
    main()
