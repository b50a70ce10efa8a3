"""LoHa, LoKr, MiSS and IA3 on tiny models against PEFT: logits, loss, gradients, five AdamW steps, merged weights."""

from typing import Any

import golden
import numpy as np

from lorajax.variants import IA3, LoHa, LoKr, MiSS


def test_lokr_on_bert() -> None:
    golden.load("lokr_bert").check(LoKr(rank=4, alpha=4.0))


def test_miss_on_llama() -> None:
    def read(variant: Any, module: str, tensors: Any) -> dict[str, np.ndarray]:
        return {"D": tensors[f"{module}.miss_block"]}  # (r, out) in both

    golden.load("miss_llama").check(MiSS(rank=8), read=read)


def test_loha_on_vit() -> None:
    golden.load("loha_vit").check(LoHa(rank=4, alpha=4.0))


def test_ia3_on_t5() -> None:
    case = golden.load("ia3_t5")
    sides = {module: IA3(side="in" if module.endswith("wo") else "out") for module in case.targets}

    def read(variant: Any, module: str, tensors: Any) -> dict[str, np.ndarray]:
        return {f"l_{sides[module].side}": tensors[f"{module}.ia3_l"]}  # (1, in) or (out, 1) there

    case.check(sides, read=read)
