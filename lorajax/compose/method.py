"""What a way of composing is: a frozen dataclass of hyperparameters with pure methods about ONE matrix."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lorajax.compose.gathered import Pair, Part

Stream = Callable[[], Iterator[Part]]
"""Every matrix of the model in turn; may be called more than once."""


@dataclass(frozen=True)
class Method(abc.ABC):
    """A way of composing. Field defaults are the paper's; the docstring has source and equation."""

    reads_taus: ClassVar[bool] = False
    """Whether `compose` reads `part.taus` where they are given, as `nested` ones have to."""

    @abc.abstractmethod
    def compose(self, part: Part, survey: Any) -> Pair | np.ndarray:
        """One matrix's update: as factors where the method has them (then it is traceable in `part.weights`), else
        dense, (in, out) float32. Where `part.taus` is given, dense of that shape."""

    def survey(self, stream: Stream, count: int) -> Any:
        """What `compose` has to know of the whole model, from passes over the matrices of `count` adapters."""
        return None

    @property
    def draws(self) -> bool:
        """Whether it needs a key."""
        return False

    def check(self, count: int) -> None:  # noqa: B027
        """Raises ValueError (value, limit, remedy) for hyperparameters outside their range, or a number of adapters
        that it has no meaning for."""


def nested(then: Method, count: int) -> None:
    """Raises ValueError for a `then` that reads factors, and what its own `check` raises."""
    if not then.reads_taus:
        raise ValueError(f"then={then} reads the factors of the adapters, not what it is handed on: give Sum(), "
                         f"TaskArithmetic(), TIES(), MagnitudePrune() or DARE()")
    then.check(count)


def share(name: str, value: float, *, zero: bool = True) -> None:
    """Raises ValueError unless 0 <= value <= 1 (zero: or 0 < value <= 1)."""
    if not (0 <= value <= 1 and (zero or value > 0)):
        raise ValueError(f"{name}={value} is outside {'[' if zero else '('}0, 1]: it is a share of the entries")
