"""DyLoRA: one training whose LoRA is usable at every rank 1..R (Valipour et al., arXiv 2210.07558).

The adapter is plain `LoRA`; `lorajax.control.dylora` does the work, with the masks of this page. For each optimizer
step one b in {0..R-1} is drawn, rank b + 1, the same for all sites, and the model runs with

    W' = W + alpha / (b+1) * A[:, :b+1] B[:b+1]

The released code multiplies both A and B by ``c = sqrt(R / (b+1))`` under LoRA's own ``s = alpha / R``, which makes the
scale that of a LoRA of rank b + 1, in training and afterwards. So does this.

frozen: only component b gets gradient, those below act as they are (the released code's default, used for GLUE).
  Otherwise all of 0..b get gradient.
strict: what gets no gradient does not move either. The released code masks no update (``strict=False``): Adam's
  momentum and weight decay go on moving the components below and above b.
Defaults of the GLUE scripts: R = 8, alpha = 16, b uniform, everything else as LoRA. The released code draws b in every
process and anew around evaluations; here the step's number decides b.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core.masks import Mask
from lorajax.variants.lora import LoRA


def component_scale(variant: LoRA) -> np.ndarray:
    """(R,) float32, c for b = 0..R-1: what A and B are both multiplied by, so that s c^2 is the scale at rank b + 1."""
    scales = [dataclasses.replace(variant, rank=k, alpha=1.0).scale for k in range(1, variant.rank + 1)]
    return np.sqrt(np.array(scales) / scales[-1]).astype(np.float32)


def mask(variant: LoRA, b: int | jax.Array, frozen: bool = True, strict: bool = True) -> Mask:
    """The mask of one matrix at rank b + 1, for training; its `on`, (R,), is all that evaluation needs."""
    i = jnp.arange(variant.rank)
    on = jnp.asarray(component_scale(variant))[b] * (i <= b).astype(jnp.float32)
    trains = (i == b) if frozen else (i <= b)
    return Mask(on, trains, trains if strict else jnp.ones(variant.rank, bool))
