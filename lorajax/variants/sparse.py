"""Sparse LoRA: most entries of A and B are zero for good (SparseAdapter, He et al., arXiv 2210.04284, on LoRA).

The adapter is plain `LoRA` (or whatever has arrays labelled `a` and `b`); `lorajax.control.sparse` does the work: it
scores every entry of A and B, keeps the share `density` with the largest scores, and from then on the others are zero:
they neither act nor move. The paper prunes adapters before training with density 1 - sparsity:

    W' = W + s (M_A * A) (M_B * B),    M = 1 where score > the k-th smallest score, k = ceil((1 - density) N)

score: ``random``; ``magnitude`` |theta|; ``snip`` |theta dL/dtheta|, which is |dL/dM| at M = 1 (the paper's best).
scope: one threshold over all arrays (``global``), or one for each (``local``).
schedule: the density after stage i of e is density^((i+1)/e) (``exponential``) or 1 - (1 - density) (i+1)/e
  (``linear``); e = 1 is pruning in one shot. An entry once pruned stays so.
The paper's "Large-Sparse" is a rank larger by 1/density at the same number of parameters.

LoRA starts at B = 0, where magnitude prunes all of B and where |theta dL/dtheta| is 0 everywhere. Two remedies: prune
after some training (`start` of the controller), and, where an array's scores are all 0 nevertheless, look there at
|dL/dtheta| (with ``snip``), then at chance, with thresholds for each array in that pruning.
"""

from __future__ import annotations

import math

import numpy as np

SCORES = ("random", "magnitude", "snip")
SCOPES = ("global", "local")
SCHEDULES = ("exponential", "linear")


def densities(density: float, stages: int = 1, schedule: str = "exponential") -> np.ndarray:
    """(stages,) float64, the share of entries left after each stage; the last is `density`."""
    share = np.arange(1, stages + 1) / stages
    return density**share if schedule == "exponential" else 1.0 - (1.0 - density) * share


def kept(density: float, size: int) -> int:
    """How many of `size` entries stay: the share `density` rounded down, but one at least."""
    return max(1, math.floor(round(density * size, 6)))
