"""Plain Flax models that know nothing of low-rank adaptation."""

# The modules named *_checkpoint register what their family's checkpoints look like.
from lorajax.models import bert_checkpoint, llama_checkpoint  # noqa: F401
from lorajax.models.adapter_names import adapter_names
from lorajax.models.bert import Bert
from lorajax.models.bert_config import BertConfig
from lorajax.models.checkpoint import Loaded, fresh_params, hf_modules, hf_names, params_from_hf, params_to_hf
from lorajax.models.deberta import Deberta, DebertaConfig
from lorajax.models.families import FAMILIES, model_from_hf
from lorajax.models.gpt2 import GPT2, GPT2Config
from lorajax.models.llama import Llama
from lorajax.models.llama_config import LlamaConfig
from lorajax.models.resnet import ResNet, ResNetConfig
from lorajax.models.stacking import replicate_layers, stack_layers, unstack_layers
from lorajax.models.t5 import T5, T5Config
from lorajax.models.untied import untied
from lorajax.models.vit import ViT, ViTConfig
from lorajax.models.whisper import Whisper, WhisperConfig

__all__ = [
    "FAMILIES",
    "GPT2",
    "T5",
    "Bert",
    "BertConfig",
    "Deberta",
    "DebertaConfig",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Loaded",
    "ResNet",
    "ResNetConfig",
    "T5Config",
    "ViT",
    "ViTConfig",
    "Whisper",
    "WhisperConfig",
    "adapter_names",
    "fresh_params",
    "hf_modules",
    "hf_names",
    "model_from_hf",
    "params_from_hf",
    "params_to_hf",
    "replicate_layers",
    "stack_layers",
    "unstack_layers",
    "untied",
]
