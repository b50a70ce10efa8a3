"""A variant as plain data and back: what a saved adapter says about each site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorajax.core.variant import Full
from lorajax.variants import NAMES
from lorajax.variants.lora import INITIALIZERS

OF_TRAINING = ("dropout", "rank_dropout", "unit_dropout", "module_dropout", "freeze_a")
"""Hyperparameters that a trained adapter's result does not depend on."""


def described(choice: Any) -> Any:
    """{'variant': name, hyperparameter: value, ...}; a wrapped variant, or another dataclass, is such a dict too."""
    if dataclasses.is_dataclass(choice) and not isinstance(choice, type):
        fields = {f.name: described(getattr(choice, f.name)) for f in dataclasses.fields(choice) if f.init}
        return {"variant": _name(type(choice)), **fields}
    return choice.item() if isinstance(choice, jax.Array | np.ndarray | np.generic) else choice


def choice_of(row: Any) -> Any:
    """The inverse of `described`. KeyError or TypeError for what this version does not have."""
    if not isinstance(row, Mapping):
        return tuple(row) if isinstance(row, list) else row
    fields = {name: choice_of(value) for name, value in row.items() if name != "variant"}
    return _types()[row["variant"]](**fields)


def differing(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What the first difference between two plans is, '' if none: sites, variants, hyperparameters."""
    for path in sorted(saved.keys() | asked.keys()):
        if path not in asked:
            return f"it adapts {path}, which these rules do not"
        if path not in saved:
            return f"it does not adapt {path}, which these rules do"
        one, other = _plain(saved[path]), _plain(asked[path])
        if one.get("variant") != other.get("variant"):
            return f"{path} is a {one.get('variant')!r} there and a {other.get('variant')!r} in these rules"
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                return f"{path} has {name}={one.get(name)!r} there and {name}={other.get(name)!r} in these rules"
    return ""


def _plain(row: Any) -> dict[str, Any]:
    """As JSON gives it back, without what matters in training only."""
    row = row if isinstance(row, Mapping) else {"variant": row}
    return {name: _plain(x) if isinstance(x, Mapping) else list(x) if isinstance(x, tuple) else x
            for name, x in row.items() if name not in OF_TRAINING}


def _types() -> dict[str, Any]:
    return {**NAMES, "full": Full, **{f"start {name}": kind for name, kind in INITIALIZERS.items()}}


def _name(kind: type) -> str:
    return next((name for name, cls in _types().items() if cls is kind), kind.__name__)
