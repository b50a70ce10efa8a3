"""A head of its own for a model whose head is its table of embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def untied(config: Any, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same function with two parameters instead of one: (config, variables). For adapters of the table alone or of
    the head alone, as PEFT has them. A folder to save it in needs `tie_word_embeddings: false` in its config.json.

    Errors: ValueError for a model that has one already, or no form with one.
    """
    if not getattr(config, "tie_embeddings", False):
        raise ValueError(f"this {type(config).__name__} is not tied, or has no form with a head of its own")
    params = dict(variables["params"])
    params["head"] = {"kernel": params["embed"]["embedding"].T}
    return dataclasses.replace(config, tie_embeddings=False), {**variables, "params": params}
