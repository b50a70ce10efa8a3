"""Quantised bases (QLoRA, arXiv 2305.14314): formats, the weight node, and which weights of a model are quantised."""

from lorajax.quant.formats import FORMATS, FP4, NF4, Q4_1, Q8_0, Format, Int8
from lorajax.quant.plan import Plan, plan, requantize
from lorajax.quant.quantized import Quantized, quantize

__all__ = ["FORMATS", "FP4", "NF4", "Q4_1", "Q8_0", "Format", "Int8", "Plan", "Quantized", "plan", "quantize",
           "requantize"]
