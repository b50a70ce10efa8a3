"""LayerNorm tuning: only the normalisations are trained (Zhao et al., arXiv 2312.11420).

There is no adapter: `lorajax.Full` on scales and biases of the layer (or RMS) norms, wherever a module's name ends in
`norm` or `ln`, a number or `f` after it or not; the head goes with them in classification. PEFT calls it LN_TUNING.

Config: `configs/layernorm.py`.
"""

from __future__ import annotations

from lorajax.core.rules import Rule
from lorajax.core.variant import Full

NORMS = r"(?i).*(norm|ln)(_?(\d+|f))?/(scale|bias|weight)"


def rules() -> list[Rule]:
    """The rule for `adapt`. Put the head's rule before it."""
    return [(NORMS, Full())]
