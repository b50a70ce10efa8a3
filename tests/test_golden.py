"""LoRA on a tiny Llama against PEFT: logits, loss, gradients, five AdamW steps, merged weights."""

import golden
import pytest

from lorajax.variants import LoRA


@pytest.mark.parametrize("options", [{}, {"remat": "full"}], ids=["plain", "remat"])
def test_lora_on_llama(options: dict[str, str]) -> None:
    golden.load("lora_qv_llama", **options).check(LoRA(rank=4, alpha=8.0))


def test_the_check_notices_a_wrong_scale() -> None:
    with pytest.raises(AssertionError):
        golden.load("lora_qv_llama").check(LoRA(rank=4, alpha=9.0))


@pytest.mark.parametrize("scan_layers", [False])
def test_lora_on_gpt2(scan_layers: bool) -> None:
    """Its weights are stored (in, out), and query, key and value are one of them."""
    golden.load("lora_conv1d_gpt2", scan_layers=scan_layers).check(LoRA(rank=4, alpha=8.0))
