"""LoraHub: weights of many adapters, learned from a few examples without gradients (Huang et al., arXiv 2307.13269)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from lorajax.compose.gathered import Pair, Part, library
from lorajax.compose.method import Method
from lorajax.compose.peft_forms import balanced


@dataclass(frozen=True)
class LoraHub(Method):
    """``dW = (sum_t w_t A_t) (sum_t w_t B_t)`` (arXiv 2307.13269, equation 1): weights act twice and cross terms
    A_i B_j come in, so a single adapter of weight w is multiplied by w^2. LoRA's scale is split evenly between A and
    B. One rank for all. `learn` finds the weights; `Sum` may take the place of this form there.
    """

    def compose(self, part: Part, survey: Any) -> Pair:
        """Factors of the inputs' rank."""
        pairs = [balanced(pair) for pair in part.pairs]
        ranks = {pair.a.shape[-1] for pair in pairs}
        if len(ranks) > 1:
            raise ValueError(f"{part.path}: the adapters have ranks {sorted(ranks)}, and LoraHub adds their A and B "
                             f"apart: use Sum(), which takes any ranks")
        xp = library(part.weights)
        return Pair(*[xp.tensordot(part.weights, np.stack(xs), 1) for xs in zip(*[p[:2] for p in pairs], strict=True)])


class Learned(NamedTuple):
    """weights: (count,), of the lowest objective seen. objective: loss + l1 mean|w|. evaluations: of the loss."""

    weights: np.ndarray
    objective: float
    evaluations: int


def learn(loss: Callable[[jax.Array], Any], count: int, *, steps: int = 40, l1: float = 0.05, bound: float = 1.5,
          reach: float = 0.5) -> Learned:
    """``argmin_w loss(w) + l1 mean_t |w_t|`` over ``|w_t| <= bound``, from w = 0, with at most `steps` evaluations.

    loss: (count,) float32 -> a number, such as the loss of a few examples under `blended`'s adapter; jit it.
    Defaults are the paper's: 0.05, box 1.5, start 0, about 40 evaluations. The paper's optimizer is nevergrad's NGOpt;
    this is SciPy's COBYLA, a trust region of linear models without gradients. reach: its first step.
    """
    if count < 1 or steps < 1:
        raise ValueError(f"count={count} and steps={steps} must be at least 1")
    best = Learned(np.zeros(count, np.float32), np.inf, 0)

    def objective(w: np.ndarray) -> float:
        nonlocal best
        if best.evaluations >= steps:
            return best.objective
        w = np.clip(w, -bound, bound).astype(np.float32)
        value = float(loss(jnp.asarray(w))) + l1 * float(np.mean(np.abs(w)))
        value = value if np.isfinite(value) else np.inf
        lower = value < best.objective
        best = Learned(w if lower else best.weights, min(value, best.objective), best.evaluations + 1)
        return value if np.isfinite(value) else 1e30

    optimize.minimize(objective, np.zeros(count), method="COBYLA", bounds=[(-bound, bound)] * count,
                      options={"maxiter": max(steps, count + 2), "rhobeg": reach})
    return best
