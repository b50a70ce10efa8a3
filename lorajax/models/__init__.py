"""Plain Flax models that know nothing of low-rank adaptation."""

from lorajax.models.bert import Bert
from lorajax.models.bert_checkpoint import Loaded, params_from_hf, params_to_hf
from lorajax.models.bert_config import BertConfig
from lorajax.models.stacking import stack_layers, unstack_layers

__all__ = ["Bert", "BertConfig", "Loaded", "params_from_hf", "params_to_hf", "stack_layers", "unstack_layers"]
