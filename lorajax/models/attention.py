"""Multi-head attention for every model here: grouped heads, rotary positions, biases, windows, cross-attention, caches.

Products go through `jax.nn.dot_product_attention`, so that one option chooses the fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.norms import RMSNorm
from lorajax.models.rotary import rotate
from lorajax.models.settings import Execution
from lorajax.models.slots import written

KeyValue = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each (B, S, kv_heads, head_dim)."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    implementation: Any = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v: q (B, T, N, H), k and v (B, S, K, H) with N a multiple of K -> (B, T, N, H).

    mask: bool, broadcastable to (B, N, T, S), True = may attend. window: with `causal`, each query sees itself and the
    `window` - 1 keys before it. scale: None is H ** -0.5. drop: applied to the probabilities, which the fused kernels
    never form, so it takes the plain path.
    """
    if drop is None:
        if implementation == "auto":
            masked = mask is not None or bias is not None
            implementation = "cudnn" if cudnn_fits(q, k, masked) else None
        if callable(implementation):
            return implementation(q, k, v, mask=mask, bias=bias, causal=causal, window=window, scale=scale)
        if implementation == "cudnn" and mask is not None:  # its bias has every query and key
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
        # JAX's function mixes bf16 with float32, which strict promotion forbids. This context covers the forward
        # pass; a bf16 gradient under strict promotion needs the same context around the whole trace.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k, v, bias=bias, mask=mask, scale=scale, is_causal=causal, implementation=implementation,
                local_window_size=None if window is None else (window - 1, 0),
            )  # fmt: skip
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    if causal:
        seen = causal_mask(q.shape[1], k.shape[1], 0, window)
        mask = seen if mask is None else mask & seen
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(logits, axis=-1)).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def cudnn_fits(q: jax.Array, k: jax.Array, masked: bool) -> bool:
    """Whether cuDNN's attention runs here: an NVIDIA GPU from Ampere on, 16 bits, heads of 8, 16, ..., 128 and, with a
    mask or bias, even lengths."""
    shapes = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    shapes = shapes and not (masked and (q.shape[1] % 2 or k.shape[1] % 2))
    if not shapes or jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    return "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8.0


def side_by_side(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Any = None, bias: Any = None, **how: Any
) -> jax.Array:
    """For `Execution.attention` where runs are vmapped: `attend` as 'auto' has it. JAX batches cuDNN's attention only
    with a mask and a bias of every head."""
    if cudnn_fits(q, k, True):
        whole = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        mask, bias = (x if x is None else jnp.broadcast_to(x, whole) for x in (mask, bias))
    return attend(q, k, v, mask=mask, bias=bias, implementation="auto", **how)


def causal_mask(queries: int, keys: int, first: int | jax.Array, window: int | None = None) -> jax.Array:
    """Bool (1, 1, queries, keys): query i, which stands at key slot `first` + i, sees the slots up to its own."""
    distance = (first + jnp.arange(queries))[:, None] - jnp.arange(keys)[None, :]
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    return seen[None, None]


class Attention(nn.Module):
    """Projections `query`, `key`, `value`, `output` with 2-D kernels around `attend`.

    features: width of the output. bias: which of query, key, value, output have one. norm_eps: with a number, RMS norm
    of each head's queries and keys (`query_norm`, `key_norm`). fused: one kernel `query_key_value` for the three, as
    GPT-2 stores them (no cross-attention then). The other fields are `attend`'s.
    """

    run: Execution
    features: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: tuple[bool, bool, bool, bool] = (True, True, True, True)
    init_std: float = 0.02
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    norm_eps: float | None = None
    fused: bool = False
    dropout: float = 0.0
    deterministic: bool = True

    def setup(self) -> None:
        init = nn.initializers.normal(self.init_std)

        def dense(features: int, bias: bool) -> nn.Dense:
            types = {"dtype": self.run.dtype, "param_dtype": self.run.param_dtype}
            return nn.Dense(features, use_bias=bias, kernel_init=init, **types)

        inner = (self.heads * self.head_dim, self.kv_heads * self.head_dim)
        if self.fused:
            self.query_key_value = dense(inner[0] + 2 * inner[1], self.bias[0])
        else:
            self.query = dense(inner[0], self.bias[0])
            self.key, self.value = dense(inner[1], self.bias[1]), dense(inner[1], self.bias[2])
        self.output = dense(self.features, self.bias[3])
        if self.norm_eps is not None:
            self.query_norm, self.key_norm = (RMSNorm(self.run, self.head_dim, self.norm_eps) for _ in range(2))
        if self.dropout:
            self.drop = nn.Dropout(self.dropout, deterministic=self.deterministic)

    def keys_values(self, x: jax.Array) -> KeyValue:
        """Keys and values of x (B, S, D), for cross-attention."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def __call__(
        self,
        x: jax.Array,
        *,
        memory: KeyValue | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        rope: tuple[jax.Array, jax.Array] | None = None,
        cache: KeyValue | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue | None]:
        """x (B, T, D) attends to itself, or to `memory` (what `keys_values` gave) -> ((B, T, features), new cache).

        cache, index: keys and values of S slots, of which the first `index` are filled; those of x are written
        behind them, and x attends to the whole cache under `mask`, which then says all (`causal_mask` and padding).
        """
        if self.fused:
            inner = self.heads * self.head_dim
            q, k, v = jnp.split(self.query_key_value(x), [inner, inner + self.kv_heads * self.head_dim], axis=-1)
            q, k, v = self._heads(q), self._heads(k), self._heads(v)
        else:
            q = self._heads(self.query(x))
            k, v = self.keys_values(x) if memory is None else memory
        if self.norm_eps is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            assert index is not None
            k, v = (written(old, new.astype(old.dtype), index) for old, new in zip(cache, (k, v), strict=True))
            cache = (k, v)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        causal = self.causal and cache is None
        y = attend(
            q, k, v, mask=mask, bias=bias, causal=causal, window=self.window if causal else None, scale=self.scale,
            implementation=self.run.attention,
            drop=self.drop if self.dropout and not self.deterministic else None,
        )  # fmt: skip
        return self.output(y.reshape(*x.shape[:2], self.heads * self.head_dim)), cache
