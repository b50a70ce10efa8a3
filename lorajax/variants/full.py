"""Full fine-tuning, and hybrids of it with low-rank updates: `lorajax.Full` in a rule.

`Full` moves a weight from the frozen to the trainable partition; nothing is stored twice, and merging is putting it
back. As rules are ordered and the first match wins, any mixture is a list of rules: heads, norms and embeddings in full
and LoRA elsewhere, other ranks for other layers, nothing at all (None) for some. A config names further rules under
`also`, which come before its `targets`.

Configs: `configs/full.py`, `configs/hybrid.py`.
"""

from __future__ import annotations

from lorajax.core.rules import Rule
from lorajax.core.variant import Full, Variant


def rules(full: str, low: str, variant: Variant) -> list[Rule]:
    """Full fine-tuning of what matches `full` (a preset or a regex), `variant` on the rest of what matches `low`."""
    return [(full, Full()), (low, variant)]
