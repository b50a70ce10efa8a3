"""LoHa, LoKr, MiSS and IA3 against PEFT's goldens: in full where there is the model, else the merged weights."""

import json
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorajax.core.variant import Variant
from lorajax.variants import IA3, LoHa, LoKr, MiSS


def test_lokr_on_bert() -> None:
    golden.load("lokr_bert").check(LoKr(rank=4, alpha=4.0))


def test_miss_on_llama() -> None:
    def read(variant: Any, module: str, tensors: Any) -> dict[str, np.ndarray]:
        return {"D": tensors[f"{module}.miss_block"]}  # (r, out) in both

    golden.load("miss_llama").check(MiSS(rank=8), read=read)


def of_module(case: str, module: str) -> Variant:
    if case == "loha_vit":
        return LoHa(rank=4, alpha=4.0)
    return IA3(side="in" if module.endswith("wo") else "out")


@pytest.mark.parametrize("case", ["loha_vit", "ia3_t5"])
def test_merged_weights(case: str) -> None:
    folder = golden.ROOT / "cases" / case
    info, expected = json.loads((folder / "case.json").read_text()), np.load(folder / "expected.npz")
    base = load_file(golden.ROOT / "bases" / info["base"].split("/")[-1] / "model.safetensors")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for module, key in info["base_weight_keys"].items():
        variant, w = of_module(case, module), jnp.asarray(base[key].T)
        like, _ = jax.eval_shape(variant.init, jax.random.key(0), w)
        there = {name: shape for name, shape in like._asdict().items() if shape is not None}
        adapter = like._replace(**{
            name: tensors[f"base_model.model.{module}.{variant.leaves[name].peft}"].T.reshape(shape.shape)
            for name, shape in there.items()
        })  # fmt: skip
        np.testing.assert_allclose(w + variant.delta(adapter, w), expected[f"merged/{module}.weight"].T, atol=2e-5)
