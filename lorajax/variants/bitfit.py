"""BitFit: only the biases are trained (Ben Zaken et al., arXiv 2106.10199, section 3).

There is no adapter: `lorajax.Full` on the biases, so merging is putting them back. The paper trains all biases of the
encoder, the layer norms' included, and the head; its smaller set is the biases of the queries and of the feed-forward
block's inside (b_q and b_m2), about half of them. Learning rates of 1e-4 to 1e-3.

Config: `configs/bitfit.py`.
"""

from __future__ import annotations

from lorajax.core.rules import Rule
from lorajax.core.variant import Full

SUBSETS = {"all": r".*/bias", "query-and-middle": r".*/(query|up|q_proj|up_proj|fc1)/bias"}


def rules(subset: str = "all") -> list[Rule]:
    """The rule of a row of SUBSETS, for `adapt`. Put the head's rule before it."""
    return [(SUBSETS[subset], Full())]
