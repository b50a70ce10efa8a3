"""DoRA: magnitude and direction of the weight, adapted apart (Liu et al., arXiv 2402.09353, equation 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorajax.core import compat
from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.lora import LoRA
from lorajax.variants.wrapper import Wrapper, inner_of, joined

SMALLEST = 1e-6
"""What a norm counts at least: the magnitude of a zero column, which is then finite and can grow."""
LEAST_GROWTH = 1e-6
"""What ||V||^2 / ||W||^2 counts at least: below it the expansion has no correct digit in float32."""
FEW = 32
"""Rank components whose A^T A B is a sum, made where it is read; of more it is a product, with a kernel of its own."""
PLAIN = LoRA()


@dataclass(frozen=True)
class DoRA(Wrapper):
    """``W' = V diag(m / ||V||)``, ``V = W + update`` (arXiv 2402.09353, equation 5), one norm per output unit.

    The released code reduces torch's dimension 1, so a norm is that of a column of our (in, out) matrix: of a linear
    layer over its inputs, of a convolution over window and input channels, of an embedding over the vocabulary. A bias
    is not scaled. Starts where `of` starts, since m = ||V|| then; exactly the identity for an update that starts at 0.

    of: the variant that makes the update, anything additive: `LoRA` (the paper; its recipe is rank 32, alpha 64,
      dropout 0.05, or half of both ranks and alphas), `AdaLoRA`, one with a `delta` alone. None: no update, the
      magnitude alone is trained (the released code's ``Wdecompose_target_modules``). Its dropout acts on the input of
      the update and of the (m / ||V|| - 1) part, which then costs a second base product, as in PEFT.
    detach: ||V|| is a constant in the backward pass (the paper's section 4.3 and the released setting). False is the
      full gradient, another algorithm.

    ``||V||^2 = ||W||^2 + 2 s diag(W^T A B) + s^2 diag(B^T A^T A B)`` in float32, with ``||W||`` computed once at the
    start: neither W + s A B nor its gradient is formed. Labels: those of `of`, and `magnitude` for m.
    """

    of: Variant | None = PLAIN
    detach: bool = True

    reads_weight = True
    reads_stored = True
    own: ClassVar[Mapping[str, Leaf]] = {
        "magnitude": Leaf("magnitude", ("out",), peft="lora_magnitude_vector"),
        "weight_norm": Leaf("norm", ("out",), trainable=False),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Any, jax.Array]:
        """Returns (the arrays of `of`, m = ||V||, ||W||), and the weight that `of` leaves."""
        inner, w = self.inner.init(key, w, stats)
        norm = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(w), 0)), SMALLEST)
        adapter = joined("DoRAAdapter", inner, magnitude=norm, weight_norm=norm)
        # Shared arrays are not here yet: an update that does not start at 0 without them raises.
        return adapter._replace(magnitude=norm / self.gain(adapter, w)), w

    def factors(self, adapter: Any, w: jax.Array) -> Factors:
        """The factors of `of`, and g = m / ||V||."""
        return self.inner.factors(inner_of(adapter), jnp.float32(w))._replace(g=self.gain(adapter, w))

    def delta(self, adapter: Any, w: jax.Array) -> jax.Array:
        """``V diag(m / ||V||) - W``."""
        return (w + self.inner.delta(inner_of(adapter), w)) * self.gain(adapter, w)[None, :] - w

    def gain(self, adapter: Any, w: jax.Array) -> jax.Array:
        """m / ||V||, (out,) float32."""
        m, norm = jnp.float32(adapter.magnitude), jnp.float32(adapter.weight_norm)
        inner = jax.lax.stop_gradient(inner_of(adapter)) if self.detach else inner_of(adapter)
        if self.factored:
            added = _added(self.inner.factors(inner, jnp.float32(w)), w)
        else:
            delta = self.inner.delta(inner, jnp.float32(w))
            added = jnp.sum((2 * jnp.float32(w) + delta) * delta, 0)
        return m / norm / jnp.sqrt(jnp.maximum(1 + added / jnp.square(norm), LEAST_GROWTH))


def _added(found: Factors, w: jax.Array) -> jax.Array:
    """||W + s A B||^2 - ||W||^2 per column, from (out, r) and (r, r) products."""
    found = found.folded()
    if found.a is None or found.b is None:
        return jnp.zeros(w.shape[1])
    a, b, s = found.a, found.b, 1.0 if found.s is None else found.s
    cross, gram = _cross(w, a), compat.einsum("ir,is->rs", a, a)
    few = b.shape[0] <= FEW
    own = jnp.sum(gram[:, :, None] * b[None], 1) if few else compat.einsum("rs,so->ro", gram, b)
    return s * jnp.sum((2 * cross + s * own) * b, 0)


def _cross(w: jax.Array, a: jax.Array) -> jax.Array:
    """A^T W, (r, out) float32. A bfloat16 W is read as it is, with A in three bfloat16 parts that add up to it: as
    exact as products of float32, without a copy of W in float32."""
    if w.dtype != jnp.bfloat16 or compat.explicit_mesh(w, a) is not None:
        return compat.einsum("io,ir->ro", jnp.float32(w), a)
    parts, rest = [], a
    for _ in range(3):  # `reduce_precision`: the compiler may drop a cast there and back
        parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    several = jnp.concatenate(parts, 1).astype(jnp.bfloat16)
    found = jnp.einsum("io,ir->ro", w, several, preferred_element_type=jnp.float32)
    return jnp.sum(found.reshape(3, a.shape[1], w.shape[1]), 0)
