"""The exact weighted sum of updates, by concatenating factors; task arithmetic (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lorajax.compose.gathered import Pair, Part
from lorajax.compose.method import Method
from lorajax.compose.svd import join


@dataclass(frozen=True)
class Sum(Method):
    """``dW = sum_t w_t dW_t``, exactly: ``A = [A_1 | A_2 ...]``, ``B = [w_1 s_1 B_1 ; w_2 s_2 B_2 ...]``, of rank
    ``sum_t r_t``. Linear in the updates, unlike PEFT's `linear` (`PEFTForm`). A negative weight takes a task away.
    """

    reads_taus: ClassVar[bool] = True

    def compose(self, part: Part, survey: Any) -> Pair | np.ndarray:
        """Concatenated factors."""
        return np.tensordot(part.weights, part.taus, 1) if part.taus is not None else join(part.pairs, part.weights)


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """``dW = lam sum_t w_t dW_t`` (arXiv 2212.04089, section 2); negation is ``w = -1``, analogy ``w = (1, -1, 1)``.

    lam: the paper tunes it on held-out data; 0.3 to 0.4 for its eight vision tasks.
    """

    lam: float = 0.3

    reads_taus: ClassVar[bool] = True

    def compose(self, part: Part, survey: Any) -> Pair | np.ndarray:
        """`Sum` with weights times lam."""
        return Sum().compose(part._replace(weights=self.lam * part.weights), survey)
