"""Tokens per second of `lorajax.serve` by its number of slots: continuous batching against one text at a time.

    python -m experiments.bench.serve [--slots 1,16,64] [--adapters 16] [--rank 16] [--prompt 128] [--new 128] [--scan]
                                      [--json FILE]

The decoder is the 1.2B shape of `experiments.bench.mixed`, weights random, bfloat16; text i is for adapter i modulo
their number, all of them on the device, each on every linear layer but the head. For each number of slots there come
three texts a slot, twice: the first time compiles. `tokens/s` counts written tokens, prompts are in the time; `full` is
the part of the slots that had a text, over all steps. No HTTP, no tokenizer. Measured: README, 'Serving'.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorajax as lj
from experiments.bench.mixed import SHAPE, SMOKE
from experiments.bench.setting import markdown, setting
from lorajax.models import Llama, LlamaConfig
from lorajax.serve.engine import Engine, Request
from lorajax.serve.residents import Residents


def parts(shape: dict[str, int], places: int, rank: int, scan: bool, dtype: Any) -> tuple[Llama, Residents]:
    # A model with random weights, and residents that draw an adapter where others read a file.
    family = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    model = Llama(LlamaConfig.from_hf({**family, **shape}, scan_layers=scan, dtype=dtype, param_dtype=dtype))
    one = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(1), one)
    sites = lj.sites(model.apply, params, one)
    adapt = lj.adapt(sites, [("all-linear", lj.LoRA(rank=rank))])

    def drawn(name: Any) -> Any:
        rng = np.random.default_rng(name)
        made = jax.tree.map(lambda x: np.float32(0.02 * rng.normal(size=x.shape)), adapt.shapes[0])
        return adapt, made, adapt.frozen(params, {})

    return model, Residents(sites, params, drawn, places=places, rank=rank)


def measure(model: Llama, residents: Residents, slots: int, adapters: int, prompt: int, new: int) -> dict[str, Any]:
    engine = Engine(model, residents, slots=slots, length=prompt + new, buckets=(prompt, prompt + new),
                    queue=3 * slots)  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(2):
        before, ends = replace(engine.counts), list[Any]()
        for i in range(3 * slots):
            ids = rng.integers(0, model.config.vocab_size, prompt).tolist()
            engine.submit(Request(ids, i % adapters, new, lambda token: False, ends.append))
        while len(ends) < 3 * slots:
            engine.turn()
        if failed := [end for end in ends if isinstance(end, Exception)]:
            raise failed[0]
    done = engine.counts.since(before)
    return {"slots": slots, "texts": 3 * slots, "tokens/s": done.tokens / done.seconds,
            "ms/step": 1e3 * done.seconds / done.steps, "full": done.rows / done.steps / slots,
            "programs": sum(engine.compiled.values())}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", default="1,16,64")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--scan", action="store_true", help="layers in one scan")
    parser.add_argument("--smoke", action="store_true", help="a toy shape, in seconds on a CPU")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    o = parser.parse_args(argv)
    if o.smoke:
        o.prompt, o.new, o.rank = 8, 8, 2
    dtype = jnp.float32 if o.smoke else jnp.bfloat16
    each = [int(slots) for slots in o.slots.split(",")]
    model, residents = parts(SMOKE if o.smoke else SHAPE, max(o.adapters, *each), o.rank, o.scan, dtype)
    where, rows = setting(), []
    for slots in each:
        rows.append(measure(model, residents, slots, o.adapters, o.prompt, o.new))
        print(json.dumps(rows[-1]), flush=True)
        if o.json:
            o.json.write_text(json.dumps({"setting": where, "rows": rows}, indent=1) + "\n")
    print(markdown(rows, where))


if __name__ == "__main__":
    main()
