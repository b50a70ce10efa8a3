"""How one array of an adapter lies in PEFT's file: derived from the axes in the leaf table, with the few exceptions.

Ours are (in, rank), (rank, out), ...; torch's are the reverse, and a convolution's `in` is (channels, *window) there
and (*window, channels) here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lorajax.core.sites import Site
from lorajax.core.variant import Variant

INPUTS = ("in", "in2")
"""Axes that span a convolution's window."""
FLAT = ("hada_w1_b", "hada_w2_b", "lokr_w2_b")
"""Arrays whose channels and window are one dimension of the file."""
POINTWISE = ("lora_B.weight", "hira_B")
"""Arrays that are 1x1 convolutions in the file."""
LOOKUP: Mapping[str, str] = {
    "lora_A.weight": "lora_embedding_A",
    "lora_B.weight": "lora_embedding_B",
    "hira_A": "hira_embedding_A",
    "hira_B": "hira_embedding_B",
}
"""What an embedding's arrays are called."""


class Form(NamedTuple):
    """One array of the leaf table: its PEFT suffix, its axes, the site and the variant it belongs to."""

    suffix: str
    axes: tuple[str, ...]
    site: Site
    variant: Variant

    @property
    def name(self) -> str:
        """The suffix at this site."""
        return LOOKUP.get(self.suffix, self.suffix) if self.site.op == "lookup" else self.suffix

    @property
    def window(self) -> tuple[int, ...]:
        """A convolution's window, () for another site."""
        return tuple(self.site.shape[i] for i in self.site.in_axes[:-1]) if self.site.op == "conv" else ()

    def to_peft(self, x: np.ndarray) -> np.ndarray:
        """Our array of one matrix -> theirs."""
        if self.suffix in SPECIAL:
            return SPECIAL[self.suffix][0](self, x)
        if self.window and self.axes[0] in INPUTS:
            x = x.reshape(*self.window, -1, x.shape[1])
            y = x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
            return y.reshape(y.shape[0], -1) if self.suffix in FLAT else y
        ones = [1] * len(self.window) if self.suffix in POINTWISE else []
        return x.transpose().reshape(*x.shape[::-1], *ones)

    def from_peft(self, y: np.ndarray) -> np.ndarray:
        """The inverse. ValueError for a number of dimensions or a window that does not fit."""
        if self.suffix in SPECIAL:
            return SPECIAL[self.suffix][1](self, y)
        if self.window and self.axes[0] in INPUTS:
            if self.suffix not in FLAT and y.shape[2:] != self.window:
                raise ValueError(f"a window of {y.shape[2:]}, this convolution has {self.window}")
            y = y.reshape(y.shape[0], -1, *self.window)
            return y.transpose(*range(2, y.ndim), 1, 0).reshape(-1, y.shape[0])
        if self.window and self.suffix in POINTWISE and y.shape[2:] == (1,) * len(self.window):
            y = y.reshape(y.shape[:2])
        if y.ndim != len(self.axes):
            raise ValueError(f"{y.ndim} dimensions, expected {len(self.axes)}")
        return y.transpose()


def _same(form: Form, x: np.ndarray) -> np.ndarray:
    return x


def _vector(leading: bool) -> tuple[Callable[[Form, np.ndarray], np.ndarray], ...]:
    """(out,) <-> (1, out, 1, 1) for a convolution; IA3 has (out, 1) or (1, in) for a linear."""

    def write(form: Form, x: np.ndarray) -> np.ndarray:
        if form.site.op == "conv":
            return x.reshape(1, -1, *[1] * len(form.window))
        return x if not leading else x[:, None] if form.axes == ("out",) else x[None, :]

    def read(form: Form, y: np.ndarray) -> np.ndarray:
        if y.size != max(y.shape, default=0):
            raise ValueError(f"shape {y.shape}, which is no vector")
        return y.reshape(-1)

    return write, read


def _chunks(form: Form, x: np.ndarray) -> np.ndarray:
    k = form.variant.k  # type: ignore[attr-defined]
    return x.reshape(k, -1, x.shape[1]) if form.axes[0] == "in" else x.reshape(x.shape[0], k, -1).transpose(1, 0, 2)


def _unchunked(form: Form, y: np.ndarray) -> np.ndarray:
    if y.ndim != 3:
        raise ValueError(f"{y.ndim} dimensions")
    return y.reshape(-1, y.shape[2]) if form.axes[0] == "in" else y.transpose(1, 0, 2).reshape(y.shape[1], -1)


SPECIAL: Mapping[str, Any] = {
    "lora_E": (lambda form, x: x[:, None], lambda form, y: y.reshape(-1)),
    "lora_magnitude_vector": _vector(False),
    "ia3_l": _vector(True),
    "miss_block": (_same, _same),
    "oft_R.weight": (_same, _same),
    "trainable_tokens_delta": (_same, _same),
    "delora_lambda": (lambda form, x: x.reshape(1), lambda form, y: y.reshape(())),
    "gralora_A": (_chunks, _unchunked),
    "gralora_B": (_chunks, _unchunked),
}
"""Suffix -> (to PEFT, from PEFT), where the axes do not tell."""
