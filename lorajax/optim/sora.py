"""SoRA's two optimizers: AdamW for the factors, an Adam of its own for the gates (arXiv 2311.11696)."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorajax.optim.recipe import NO_DECAY, adamw


def sora(learning_rate: optax.ScalarOrSchedule, *, adapt: Any, gate_ratio: float = 1.0,
         weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, gate_eps: float = 1e-6,
         no_decay: str = NO_DECAY) -> optax.GradientTransformation:
    """Adam without decay at ``gate_ratio * learning_rate`` for the leaves labelled `gate`, AdamW for all others.

    adapt: its labels say which is which. The proximal step is `lorajax.control.sora`. gate_ratio: the released code's
    sparse_lr over its learning rate (the same by default).
    gate_eps: of the gates' Adam, 1e-6 as in the class that the released one derives from.
    Raises ValueError if nothing has that label.
    """
    labels = adapt.labels
    if "gate" not in jax.tree.leaves(labels):
        raise ValueError(f"no array is labelled 'gate'; there are {sorted(set(jax.tree.leaves(labels)))}: give at "
                         f"least one path SoRA(...), or use adamw")
    fast = (lambda step: gate_ratio * learning_rate(step)) if callable(learning_rate) else gate_ratio * learning_rate
    transforms = {
        "gate": optax.adam(fast, b1=b1, b2=b2, eps=gate_eps),
        "rest": adamw(learning_rate, weight_decay, b1=b1, b2=b2, eps=eps, no_decay=no_decay),
    }
    return optax.multi_transform(transforms, jax.tree.map(lambda x: "gate" if x == "gate" else "rest", labels))
