"""Time of a batch whose rows have different adapters, against the base and one adapter alone, in the same run.

    python -m experiments.bench.mixed [--adapters 64] [--rank 16] [--rows 64] [--tokens 128] [--scan] [--json FILE]

The decoder is the 1.2B shape (16 layers of 2048, 32 heads and 8 for keys, feed-forward 8192, vocabulary 32000),
weights random, bfloat16, an adapter of the rank on each linear layer but the head. Prefill: logits of rows x tokens.
Decode: one more token for each row, from a cache that holds `tokens`. The three programs take turns, so that a busy
machine slows all; medians, and the ratios of the medians. Row i has adapter i modulo their number. Not yet measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lorajax as lj
from experiments.bench.setting import markdown, setting
from lorajax.models import Llama, LlamaConfig
from lorajax.models.cache import Cache

SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip
SMOKE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
RULE = r".*/(query|key|value|output|gate|up|down)/kernel"
Programs = dict[str, Callable[[], Any]]


def programs(shape: dict[str, int], adapters: int, rank: int, rows: int, tokens: int, scan: bool = False,
             dtype: Any = jnp.bfloat16) -> tuple[Programs, Programs]:
    # What to time, compiled: prefill and decode, each of the base, of one adapter, of one per row.
    family = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    model = Llama(LlamaConfig.from_hf({**family, **shape}, scan_layers=scan, dtype=dtype, param_dtype=dtype))
    ids = jax.random.randint(jax.random.key(0), (rows, tokens), 0, shape["vocab_size"])
    params = jax.jit(model.init)(jax.random.key(1), ids[:1, :2])
    adapt = lj.adapt(lj.sites(model.apply, params, ids[:1]), [(RULE, lj.LoRA(rank=rank))], dtype=dtype)
    trainable, frozen = adapt.init(jax.random.key(2), params)
    drawn = [0.02 * jax.random.normal(jax.random.key(i), (adapters, *x.shape), dtype)
             for i, x in enumerate(jax.tree.leaves(trainable))]
    many = jax.tree.unflatten(jax.tree.structure(trainable), drawn)
    bank = lj.bank(adapt, many, frozen)
    bound = adapt.bind(jax.tree.map(lambda x: x[0], many), frozen)
    index = jnp.arange(rows) % adapters

    def decode(params: Any, ids: jax.Array, cache: Cache) -> Any:
        return model.apply(params, ids, cache, method="decode")

    axes = Cache(layers=1 if scan else 0, used=None, mask=0, source_mask=0)  # type: ignore[arg-type]
    prefill = jax.jit(model.apply), jax.jit(lj.lift(model.apply, strict=True)), jax.jit(lj.mixed(model.apply))
    step = (jax.jit(decode), jax.jit(lj.lift(decode, strict=True)),
            jax.jit(lj.mixed(decode, in_axes=(0, axes), out_axes=(0, axes))))
    _, cache = step[0](params, ids, model.empty_cache(rows, tokens + 1))

    def calls(run: Any, *inputs: Any) -> Programs:
        return {"base": lambda: run[0](params, *inputs), "one adapter": lambda: run[1](bound, *inputs),
                "one per row": lambda: run[2](bank, index, *inputs)}

    return calls(prefill, ids), calls(step, ids[:, -1:], cache)


def measure(runs: Programs, repeats: int) -> dict[str, float]:
    # Milliseconds by name, and the ratio of each to the base.
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(t) for name, t in times.items()}
    return {**{f"{name} ms": t for name, t in ms.items()},
            **{f"{name} / base": t / ms["base"] for name, t in ms.items() if name != "base"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--scan", action="store_true", help="layers in one scan")
    parser.add_argument("--smoke", action="store_true", help="a toy shape, in seconds on a CPU")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    o = parser.parse_args()
    if o.smoke:
        o.tokens, o.rank = min(o.tokens, 16), min(o.rank, 4)
    prefill, decode = programs(SMOKE if o.smoke else SHAPE, o.adapters, o.rank, o.rows, o.tokens, o.scan,
                               jnp.float32 if o.smoke else jnp.bfloat16)
    where, rows = setting(), []
    what = f"{o.rows} rows, {o.adapters} adapters of rank {o.rank}"
    for name, runs in ((f"prefill of {o.tokens}, {what}", prefill), (f"decode behind {o.tokens}, {what}", decode)):
        rows.append({"program": name, **measure(runs, o.repeats)})
        print(json.dumps(rows[-1]), flush=True)
    if o.json:
        o.json.write_text(json.dumps({"setting": where, "rows": rows}, indent=1) + "\n")
    print(markdown(rows, where))


if __name__ == "__main__":
    main()
