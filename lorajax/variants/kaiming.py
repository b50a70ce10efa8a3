"""torch's ``kaiming_uniform_(a=sqrt(5))``, from which most released codes start their first factor."""

from __future__ import annotations

import math

import jax


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform on +-1/sqrt(fan_in), float32."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
