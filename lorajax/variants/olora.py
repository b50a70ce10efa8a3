"""OLoRA: LoRA that starts from a QR decomposition of the weight (arXiv 2406.01775)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorajax.variants.initializer import Initializer, peaks


@dataclass(frozen=True)
class OLoRA(Initializer):
    """``W^T = Q R; B = Q_r^T, A = R_r^T`` and s A B is taken off W (arXiv 2406.01775). The
    work is done by `LoRA(initializer="olora")`.

    B has orthonormal rows, each with its largest entry positive. A and B are not divided by s: only what is taken off
    the weight carries it, so the start is the pretrained function for any s, but the adapter's share of it grows with
    s. No hyperparameters.
    """

    subtracts: ClassVar[bool] = True

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """A and B of the first `rank` columns of Q and rows of R."""
        q, r = jnp.linalg.qr(w.T)
        q, r = q[:, :rank], r[:rank]
        sign = peaks(q)
        return r.T * sign[None, :], sign[:, None] * q.T
