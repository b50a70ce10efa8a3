"""From a Hugging Face `config.json` to the model that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from lorajax.models.bert import Bert
from lorajax.models.bert_config import FAMILIES as BERTS
from lorajax.models.bert_config import BertConfig
from lorajax.models.deberta import Deberta, DebertaConfig
from lorajax.models.gpt2 import GPT2, GPT2Config
from lorajax.models.llama import Llama
from lorajax.models.llama_config import MEMBERS as LLAMAS
from lorajax.models.llama_config import LlamaConfig
from lorajax.models.resnet import ResNet, ResNetConfig
from lorajax.models.settings import choice
from lorajax.models.t5 import T5, T5Config
from lorajax.models.vit import ViT, ViTConfig
from lorajax.models.whisper import Whisper, WhisperConfig


class Family(NamedTuple):
    """config: class with `from_hf`; model: the Linen module of such a config, `model(config)`."""

    config: Any
    model: Any


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(BERTS, Family(BertConfig, Bert)),
    "t5": Family(T5Config, T5),
    "mt5": Family(T5Config, T5),
    "whisper": Family(WhisperConfig, Whisper),
    "vit": Family(ViTConfig, ViT),
    "dinov2": Family(ViTConfig, ViT),
    "resnet": Family(ResNetConfig, ResNet),
    "deberta-v2": Family(DebertaConfig, Deberta),
    "gpt2": Family(GPT2Config, GPT2),
    **dict.fromkeys(LLAMAS, Family(LlamaConfig, Llama)),
}
"""`model_type` of Hugging Face -> Family."""


def model_from_hf(config: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """The model of a config.json's dictionary; its configuration is `model.config`, of which `overrides` are fields.

    Error: ValueError with the nearest name for an unknown `model_type`, and what the family's `from_hf` raises.
    """
    kind = str(config.get("model_type"))
    choice("model_type", kind, tuple(FAMILIES))
    family = FAMILIES[kind]
    return family.model(family.config.from_hf(config, **overrides))
