"""FLOPs of value_and_grad by XLA's cost analysis: through adapters, through W + AB, of all parameters, and the ideal.
And what DoRA adds to LoRA: its norms cost as much as `rank` tokens more in the forward pass, whatever the batch.

    python -m experiments.bench.flops [--json FILE]

The ideal is the base's forward pass and the gradients of its activations (taken as the gradient with respect to the
biases of the first layer's query, key and value, below which no gradient is needed), plus the adapters' own products,
counted by hand. Nothing is executed. XLA counts the body of a loop once, so layers are unrolled.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.bench.encoder import adapted, encoder
from experiments.bench.setting import markdown, setting
from lorajax.variants import DoRA

# name: sizes. The first is like a small encoder on short texts; the second has few tokens and wide weights.
CASES: dict[str, dict[str, int]] = {
    "12 layers of 256, 512 tokens": {"layers": 12, "width": 256, "ffn": 1024, "heads": 4, "batch": 16, "tokens": 32},
    "6 layers of 1024, 32 tokens": {"layers": 6, "width": 1024, "ffn": 4096, "heads": 16, "batch": 2, "tokens": 16},
}
FIRST = ("query", "key", "value")


def flops(fn: Callable[..., Any], *args: Any) -> float:
    cost: Any = jax.jit(fn).lower(*args).compile().cost_analysis()
    return float(cost["flops"])


def products(trainable: Any, tokens: int) -> float:
    """FLOPs of x A and (x A) B forward; dB, d(x A), dA and dx backward: three times 2 tokens rank (in + out)."""
    total = 0.0
    for path, adapter in trainable.items():
        (n_in, rank), n_out = adapter.A.shape, adapter.B.shape[-1]
        total += 6.0 * tokens * rank * (n_in + n_out)
        if path.startswith("layer_0/") and path.split("/")[-2] in FIRST:
            total -= 2.0 * tokens * rank * n_in  # nothing below the first layer wants dx
    return total


def measure(rank: int = 8, **sizes: int) -> dict[str, float]:
    """FLOPs by name, and the ratio of each to the ideal."""
    model = encoder("unrolled", **sizes)
    tuned = adapted(model, rank)

    def bottom(biases: dict[str, jax.Array], params: Any, x: jax.Array) -> jax.Array:
        first = params["layer_0"]
        attention = {**first["attention"], **{n: {**first["attention"][n], "bias": biases[n]} for n in FIRST}}
        return model.loss({**params, "layer_0": {**first, "attention": attention}}, x)

    biases = {name: model.params["layer_0"]["attention"][name]["bias"] for name in FIRST}
    base = flops(jax.value_and_grad(bottom), biases, model.params, model.x)
    counts = {
        "ideal": base + products(tuned.trainable, sizes["batch"] * sizes["tokens"]),
        "lifted": flops(jax.value_and_grad(tuned.lifted), tuned.trainable, tuned.frozen, model.x),
        "W + AB": flops(jax.value_and_grad(tuned.merged), tuned.trainable, tuned.frozen, model.x),
        "full": flops(jax.value_and_grad(model.loss), model.params, model.x),
    }
    dora = adapted(model, rank, DoRA)
    ratio = flops(jax.value_and_grad(dora.lifted), dora.trainable, dora.frozen, model.x) / counts["lifted"]
    return {**counts, **{f"{name} / ideal": count / counts["ideal"] for name, count in counts.items()},
            "DoRA / LoRA": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    where, rows = setting(), []
    for name, sizes in CASES.items():
        m = measure(**sizes)
        counts = {f"{key} GFLOP": m[key] / 1e9 for key in ("ideal", "lifted", "W + AB", "full")}
        rows.append({"model": name, **counts, **{key: m[key] for key in m if "/" in key and "ideal /" not in key}})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"setting": where, "rows": rows}, indent=1) + "\n")
    print(markdown(rows, where))


if __name__ == "__main__":
    main()
