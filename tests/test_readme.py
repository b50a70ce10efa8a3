"""The README's example runs and does what it says; the paths that the documents name exist."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lorajax import config

ROOT = Path(__file__).parents[1]


def example(number: int = 0) -> str:
    """The twenty lines, and what makes them those of a mesh."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    return blocks[number]


def test_example_has_twenty_lines() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 20


def test_example_learns_and_merges() -> None:
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to powers of int32 counters
        exec(compile(example(), "README.md", "exec"), names)
    start, _ = names["adapt"].init(jax.random.key(2), names["params"])
    loss, trainable, frozen = names["loss"], names["trainable"], names["frozen"]
    assert float(loss(trainable)) < 0.5 * float(loss(start))

    assert {path: adapter.A.shape[-1] for path, adapter in trainable.items() if hasattr(adapter, "A")} == {
        "params/layers_0/kernel": 2,
        "params/layers_2/kernel": 4,
    }
    # Merged parameters by hand: W + alpha / rank * A B; LoRA's default alpha is 8. The biases were trained themselves.
    for layer in ("layers_0", "layers_2"):
        adapter = trainable[f"params/{layer}/kernel"]
        scale = 8.0 / adapter.A.shape[-1]
        update = scale * np.asarray(adapter.A, np.float64) @ np.asarray(adapter.B, np.float64)
        expected = {
            "kernel": np.asarray(names["params"]["params"][layer]["kernel"]) + update,
            "bias": np.asarray(trainable[f"params/{layer}/bias"].w),
        }
        for name, array in expected.items():
            np.testing.assert_allclose(names["merged"]["params"][layer][name], array, rtol=1e-5, atol=1e-6)
    bound = names["adapt"].bind(trainable, frozen)
    np.testing.assert_allclose(
        names["lifted"](bound, names["x"]), names["model"].apply(names["merged"], names["x"]), rtol=1e-5, atol=1e-5
    )


def test_the_example_on_a_mesh_has_the_gradients_of_one_device() -> None:
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(example().replace("range(50)", "range(0)"), "README.md", "exec"), names)
    alone = names["gradient"](names["trainable"])
    exec(compile(example(1), "README.md", "exec"), names)
    spread = jax.jit(jax.grad(names["loss"]))(names["trainable"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone, spread)
    path = "params/layers_0/kernel"
    assert names["frozen"].base[path].sharding.spec == P(None, "tensor")
    assert names["trainable"][path].B.sharding.spec == P(None, "tensor")
    moments = names["opt_state"].inner_states["b"].inner_state[0].mu
    assert moments[path].B.sharding.spec == P(None, "tensor")
    assert names["x"].sharding.spec == P("data")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/adding_a_variant.md"])
def test_named_paths_exist(document: str) -> None:
    named = re.findall(r"`((?:lorajax|experiments|configs|tests|docs|\.ci)/[\w./]*)`", (ROOT / document).read_text())
    links = re.findall(r"\]\(([\w./]+)\)", (ROOT / document).read_text())
    assert named
    assert [path for path in {*named, *links} if not (ROOT / path).exists() and "signs" not in path] == []


def methods() -> str:
    return (ROOT / "README.md").read_text().split("## Methods")[1].split("\n## ")[0]


def test_scores_are_those_of_the_configs() -> None:
    scores = re.findall(r"`(\w+)` (\d\d\.\d) (\d\d\.\d)", methods())
    assert len(scores) > 40
    for name, *percents in scores:
        header = " ".join((ROOT / "configs" / f"{name}.py").read_text().split('"""')[1].split())
        on_gpu = header[header.index("On a GPU" if "On a GPU" in header else "Measured"):]
        assert re.findall(r"accuracy (0\.\d+)", on_gpu)[:2] == [f"{float(x) / 100:.3f}" for x in percents], name


def test_ranks_are_those_of_the_configs() -> None:
    stated = dict(re.findall(r"`(\w+)` (\d+)\b(?!\.\d)", methods()))
    names = [name for name, *_ in re.findall(r"`(\w+)` (\d\d\.\d) (\d\d\.\d)", methods())]
    ranks = {name: config.load(str(ROOT / "configs" / f"{name}.py")).args.get("rank", 8) for name in names}
    assert {name: str(rank) for name, rank in ranks.items() if rank != 8} == stated
