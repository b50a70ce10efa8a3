"""LoRA on a tiny Llama against PEFT: logits, loss, gradients, five AdamW steps, merged weights."""

import golden
import pytest

from lorajax.variants import LoRA


def test_lora_on_llama() -> None:
    golden.load("lora_qv_llama").check(LoRA(rank=4, alpha=8.0))


def test_the_check_notices_a_wrong_scale() -> None:
    with pytest.raises(AssertionError):
        golden.load("lora_qv_llama").check(LoRA(rank=4, alpha=9.0))


def test_lora_on_gpt2() -> None:
    """Its weights are stored (in, out), and query, key and value are one of them."""
    golden.load("lora_conv1d_gpt2").check(LoRA(rank=4, alpha=8.0))
