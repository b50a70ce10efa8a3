"""Rotary positions (RoFormer, arXiv:2104.09864) in Hugging Face's layout, with the published ways to stretch them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.models.settings import choice

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Frequencies theta ** (-2 i / head_dim), stretched by `kind`:

    'default': not; 'linear': divided by `factor` (arXiv:2306.15595); 'dynamic': theta grows once a sequence is longer
    than `trained` (NTK); 'llama3': frequencies of wavelength above trained / low_freq are divided by `factor`, below
    trained / high_freq kept, between them blended (Llama 3.1); 'yarn': blended over dimensions between `beta_slow` and
    `beta_fast` rotations in `trained` tokens (rounded outwards if `truncate`), and the vectors multiplied by
    `attention_factor` (arXiv:2309.00071).
    trained: length that the model was trained on before it was stretched.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    trained: int = 2048
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        choice("rope type", self.kind, KINDS)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Rope:
        """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).

        Error: ValueError for a type that is not in KINDS, or one with parameters per kind of layer.
        """
        given: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            found = config.get(key) or {}
            if not isinstance(found, Mapping):
                raise ValueError(f"config.json has {key}={found!r}: it must be an object, or null")
            given |= found
        if any(isinstance(value, Mapping) for value in given.values()):
            raise ValueError(f"rope_parameters differ by kind of layer ({sorted(given)}); this model has one for all")
        kind = given.get("rope_type") or given.get("type") or "default"
        longest = config.get("max_position_embeddings", cls.trained)
        trained = longest if kind == "dynamic" else given.get("original_max_position_embeddings") or longest
        theta = given.get("rope_theta", config.get("rope_theta", cls.theta))
        names = {"low_freq_factor": "low_freq", "high_freq_factor": "high_freq"}
        names |= {name: name for name in ("factor", "beta_fast", "beta_slow", "attention_factor")}
        fields = {ours: float(given[theirs]) for theirs, ours in names.items() if given.get(theirs) is not None}
        if kind == "yarn" and fields.get("attention_factor") is None and given.get("mscale"):
            if whole := given.get("mscale_all_dim"):
                factor = fields.get("factor", 1.0)
                fields["attention_factor"] = _mscale(factor, given["mscale"]) / _mscale(factor, whole)
        truncate = bool(given.get("truncate", True))
        return cls(theta=float(theta), kind=kind, trained=int(trained), truncate=truncate, **fields)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_table(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32 (B, T, head_dim / 2), for integer `positions` (B, T)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    if rope.kind == "dynamic":
        length = jnp.maximum(positions.max() + 1, rope.trained).astype(jnp.float32)
        stretch = rope.factor * length / rope.trained - (rope.factor - 1)
        frequencies = (rope.theta * stretch ** (head_dim / (head_dim - 2))) ** -exponents
    else:
        frequencies = rope.theta**-exponents
    scale = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.trained * frequencies / (2 * math.pi)
        blend = jnp.clip((turns - rope.low_freq) / (rope.high_freq - rope.low_freq), 0.0, 1.0)
        frequencies = (1 - blend) * frequencies / rope.factor + blend * frequencies
    elif rope.kind == "yarn":
        low, high = (
            head_dim * math.log(rope.trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low or 0.001), 0.0, 1.0)
        frequencies = frequencies / rope.factor * ramp + frequencies * (1 - ramp)
        scale = rope.attention_factor or _mscale(rope.factor)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x_i, x_{i + H/2}) of x (B, T, N, H) by the angles, in float32; returned in x's dtype."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
