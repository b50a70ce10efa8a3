"""Cross entropy of a frozen head, in chunks of tokens: the logits of all tokens are never there at once.

With a frozen head the backward pass needs the gradient of the hidden states alone, which is as large as they are; it is
made in the forward pass, chunk by chunk, from logits that are then forgotten.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def frozen_head_loss(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int = 1024,
    smoothing: float = 0.0,
) -> jax.Array:  # fmt: skip
    """Weighted mean cross entropy, float32 scalar, of `hidden @ kernel` against `labels`.

    hidden (..., D), kernel (D, V) (a tied table transposed), labels int (...), weights (...), 0 for tokens that do not
    count. Products in hidden's dtype, softmax in float32. chunk: tokens whose logits (chunk, V) exist at a time; it
    need not divide their number. smoothing: the share of the target that is spread over all V labels, the right one
    included (Szegedy et al. 2016, arXiv:1512.00567, eq. 7). Nothing flows back to kernel, labels and weights:
    `jax.lax.stop_gradient`.
    """
    kernel, weights = jax.lax.stop_gradient((kernel, weights))
    flat, weights = hidden.reshape(-1, hidden.shape[-1]), weights.reshape(-1).astype(jnp.float32)
    labels = jnp.where(weights > 0, labels.reshape(-1), 0)  # what does not count may be no label at all (-100)
    short = -flat.shape[0] % chunk if flat.shape[0] > chunk else 0
    if short:
        flat, labels, weights = (jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1))) for x in (flat, labels, weights))
    size = min(chunk, flat.shape[0])
    parts = tuple(x.reshape(-1, size, *x.shape[1:]) for x in (flat, labels, weights))
    total = _total(smoothing, parts[0], kernel.astype(hidden.dtype), parts[1], parts[2])
    return total / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    smoothing: float, hidden: jax.Array, kernel: jax.Array, labels: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum of weighted losses over chunks: hidden (C, N, D), labels and weights (C, N)."""
    return jax.lax.map(lambda part: _chunk(smoothing, kernel, *part)[0], (hidden, labels, weights)).sum()


def _chunk(
    smoothing: float, kernel: jax.Array, hidden: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of one chunk, and the gradient of its logits (N, V) in hidden's dtype."""
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    top = jax.nn.logsumexp(logits, axis=-1)
    right = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    aim = (1.0 - smoothing) * jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    if smoothing:
        right = (1.0 - smoothing) * right + smoothing * logits.mean(axis=-1)
        aim = aim + smoothing / logits.shape[-1]
    wrong = jnp.exp(logits - top[:, None]) - aim
    return ((top - right) * weights).sum(), (wrong * weights[:, None]).astype(hidden.dtype)


def _forward(
    smoothing: float, hidden: jax.Array, kernel: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def one(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        loss, wrong = _chunk(smoothing, kernel, *part)
        return loss, jnp.matmul(wrong, kernel.T)

    losses, towards = jax.lax.map(one, (hidden, labels, weights))
    return losses.sum(), towards


def _backward(smoothing: float, towards: jax.Array, by: jax.Array) -> tuple[jax.Array, None, None, None]:
    return (towards * by.astype(towards.dtype)), None, None, None


_total.defvjp(_forward, _backward)


def frozen_head_log_probs(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, chunk: int = 1024
) -> jax.Array:
    """log softmax(`hidden @ kernel`) at `labels`: hidden (..., D), kernel (D, V), labels int (...), each a row of it ->
    (...) float32, for losses that are no mean over tokens (DPO). Nothing flows back to kernel and labels.

    Products in hidden's dtype, softmax in float32. chunk: tokens whose logits (chunk, V) exist at a time; the backward
    pass makes them again.
    """
    kernel = jax.lax.stop_gradient(kernel).astype(hidden.dtype)
    flat, which = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    size = min(chunk, flat.shape[0])
    short = -flat.shape[0] % size
    flat, which = jnp.pad(flat, ((0, short), (0, 0))), jnp.pad(which, (0, short))

    @jax.checkpoint
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = jnp.matmul(part[0], kernel, preferred_element_type=jnp.float32)
        right = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0]
        return right - jax.nn.logsumexp(logits, axis=-1)

    found = jax.lax.map(one, (flat.reshape(-1, size, flat.shape[1]), which.reshape(-1, size)))
    return found.reshape(-1)[: labels.size].reshape(labels.shape)
