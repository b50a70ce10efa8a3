"""Attention over short sequences: all queries and keys of a head are one block, forward and backward one kernel each.

cuDNN's kernels are made for long sequences: forward they keep what the backward pass reads again, backward they run
three kernels, and under a mask they read a bias for every query and key. Of at most `LONGEST` tokens one block of a GPU
holds the whole head. So the forward pass reads q, k, v and writes the result, the backward pass reads q, k, v and the
result's cotangent, computes the probabilities again and writes three gradients: nothing else meets memory. Written in
Pallas for Triton; runs under a vmap are one kernel.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from lorajax.models.attention import attend, cudnn_fits, side_by_side

LONGEST = 128
"""Most queries or keys: the probabilities and their cotangents, in float32, are held in registers."""


def short_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Any = None, bias: Any = None, causal: bool = False,
    window: int | None = None, scale: float | None = None, otherwise: Any = None,
) -> jax.Array:  # fmt: skip
    """For `Execution.attention`: `attend` as one block a head where `fits` says so, else `otherwise`, None for
    what 'auto' is. Not for arrays that are split over a mesh: the compiler would gather them."""
    if causal or (scale is not None and scale <= 0) or not fits(q, k, mask, bias):
        otherwise = otherwise or partial(attend, implementation="auto")
        return otherwise(q, k, v, mask=mask, bias=bias, causal=causal, window=window, scale=scale)
    rows, keys = q.shape[0], k.shape[1]
    seen = jnp.ones((rows, keys), jnp.int32) if mask is None else mask[:, 0, 0].astype(jnp.int32)
    seen = jnp.broadcast_to(seen, (rows, keys))
    return attend_block(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale)


def short_side_by_side(q: jax.Array, k: jax.Array, v: jax.Array, **how: Any) -> jax.Array:
    """The same where runs are vmapped: else `side_by_side`."""
    return short_attention(q, k, v, otherwise=side_by_side, **how)


def fits(q: jax.Array, k: jax.Array, mask: Any, bias: Any) -> bool:
    """Whether the kernels run here: where cuDNN's would, at most `LONGEST` queries and keys, as many heads of keys as
    of queries, a head size that is a power of two from 16 on, no bias, and a mask (B or 1, 1, 1, S) of keys if any."""
    plain = bias is None and (mask is None or mask.shape[1:] == (1, 1, k.shape[1]))
    shapes = max(q.shape[1], k.shape[1]) <= LONGEST and q.shape[2] == k.shape[2] and q.shape[-1] == _side(q.shape[-1])
    return plain and shapes and cudnn_fits(q, k, False)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_block(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float, interpret: bool = False
) -> jax.Array:
    """softmax(scale q k^T) v: q (B, T, N, H), k and v (B, S, N, H), seen (B, S) int32, 0 for keys that no query sees,
    which must be finite nevertheless; scale > 0. A row that sees none takes the mean of all its values, as by a mask of
    the least float."""
    return _forward.bind(q, k, v, seen, scale=scale, interpret=interpret)[0]


def _kept(q: Any, k: Any, v: Any, seen: Any, scale: float, interpret: bool) -> Any:
    return attend_block(q, k, v, seen, scale, interpret), (q, k, v, seen)


def _gradients(scale: float, interpret: bool, kept: Any, by: jax.Array) -> Any:
    return *_backward.bind(*kept, by, scale=scale, interpret=interpret), None


attend_block.defvjp(_kept, _gradients)

# Named as JAX names cuDNN's, by which `keeps_products` and `lorajax.sites` know them.
_forward, _backward = Primitive("dot_product_attention_fwd_block"), Primitive("dot_product_attention_bwd_block")
_forward.def_abstract_eval(lambda q, k, v, seen, **_: [q])
_backward.def_abstract_eval(lambda q, k, v, seen, by, **_: [q, k, v])


def _batched(primitive: Primitive, args: Any, dims: Any, **how: Any) -> Any:
    """Runs side by side are more rows."""
    (n,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}
    whole = [jnp.broadcast_to(x, (n, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
             for x, d in zip(args, dims, strict=True)]  # fmt: skip
    out = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in whole), **how)
    return [x.reshape(n, -1, *x.shape[1:]) for x in out], [0] * len(out)


def _forward_call(q: Any, k: Any, v: Any, seen: Any, *, scale: float, interpret: bool) -> list[jax.Array]:
    return _call(partial(_forward_block, scale=scale), [q, k, v], seen, [q], interpret)


def _backward_call(q: Any, k: Any, v: Any, seen: Any, by: Any, *, scale: float, interpret: bool) -> list[jax.Array]:
    return _call(partial(_backward_block, scale=scale), [q, k, v, by], seen, [q, k, v], interpret)


for primitive, call in ((_forward, _forward_call), (_backward, _backward_call)):
    primitive.multiple_results = True
    primitive.def_impl(call)
    mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=True))
    batching.primitive_batchers[primitive] = partial(_batched, primitive)


def _call(kernel: Any, arrays: list[jax.Array], seen: jax.Array, like: list[jax.Array],
          interpret: bool) -> list[jax.Array]:
    """`kernel` for each head of each row; neighbours in the grid are heads, which are neighbours in memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def block(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, _side(x.shape[1]), None, x.shape[3]), lambda n, b: (b, 0, n, 0))

    rows, tokens, heads, _ = arrays[0].shape
    keys = seen.shape[1]
    return pl.pallas_call(
        partial(kernel, sizes=(tokens, keys)),
        grid=(heads, rows),
        in_specs=[*map(block, arrays), pl.BlockSpec((None, _side(keys)), lambda n, b: (b, 0))],
        out_specs=[block(x) for x in like],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=triton.CompilerParams(num_warps=_warps(arrays[0].shape, keys), num_stages=1),
        name="short_attention" + kernel.func.__name__, interpret=interpret,
    )(*arrays, seen)  # fmt: skip


def _side(n: int) -> int:
    """The block's side: a power of two from 16 on, as Triton's products need it."""
    return max(16, 1 << (n - 1).bit_length())


def _warps(shape: tuple[int, ...], keys: int) -> int:
    """Of many programs two at a time do more on a processor, though a few numbers do not fit into their registers."""
    rows, tokens, heads, size = shape
    return 4 if max(tokens, keys) <= 64 or (size <= 64 and rows * heads >= 2048) else 8


def _forward_block(*refs: Any, scale: float, sizes: Any) -> None:
    q_ref, k_ref, v_ref, seen_ref, out_ref = refs
    q, k, v = _read(q_ref, sizes[0]), _read(k_ref, sizes[1]), _read(v_ref, sizes[1])
    e, _ = _exponentials(q, k, seen_ref, scale, sizes[1])
    _write(out_ref, _dot(e.astype(v.dtype), v, 1, 0) * (1 / jnp.sum(e, -1))[:, None], sizes[0])


def _backward_block(*refs: Any, scale: float, sizes: Any) -> None:
    """The products for dk and dv are their transposes': XLA takes a transpose of the probabilities or their cotangents
    back through all that they are made of, and the kernel would make each a second time, transposed."""
    q_ref, k_ref, v_ref, by_ref, seen_ref, dq_ref, dk_ref, dv_ref = refs
    q, k, v = _read(q_ref, sizes[0]), _read(k_ref, sizes[1]), _read(v_ref, sizes[1])
    by = _read(by_ref, sizes[0])
    e, sees = _exponentials(q, k, seen_ref, scale, sizes[1])
    p = e * (1 / jnp.sum(e, -1))[:, None]
    _write(dv_ref, _dot(by, p.astype(by.dtype), 0, 0).T, sizes[1])
    dp = _dot(by, v, 1, 1)
    ds = p * (dp - jnp.sum(p * dp, -1)[:, None]) * jnp.where(sees, jnp.float32(scale), 0.0)[:, None]
    ds = ds.astype(q.dtype)
    _write(dq_ref, _dot(ds, k, 1, 0), sizes[0])
    _write(dk_ref, _dot(q, ds, 0, 0).T, sizes[1])


def _exponentials(q: jax.Array, k: jax.Array, seen_ref: Any, scale: float, keys: int) -> tuple[jax.Array, jax.Array]:
    """The probabilities before they are divided by each row's sum, (T, S) float32, 0 where the block is wider than the
    keys; and which rows see a key, (T,)."""
    real = jnp.arange(k.shape[0]) < keys
    where = jnp.where(_load(seen_ref, real, 0) > 0, 0.0, jnp.where(real, jnp.float32(-1e30), -jnp.inf))
    logits = where[None, :] + _dot(q, k, 1, 1)
    most = jnp.max(logits, -1)
    return jnp.exp2((logits - most[:, None]) * (scale * math.log2(math.e))), most > -1e29


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _load(ref: Any, where: Any, other: Any) -> jax.Array:
    from jax.experimental.pallas import triton

    return triton.load(ref, mask=where, other=other)


def _read(ref: Any, n: int) -> jax.Array:
    """The block, 0 from row n on."""
    if ref.shape[0] == n:
        return ref[...]
    return _load(ref, (jnp.arange(ref.shape[0]) < n)[:, None], 0)


def _write(ref: Any, x: jax.Array, n: int) -> None:
    from jax.experimental.pallas import triton

    mask = None if ref.shape[0] == n else jnp.broadcast_to((jnp.arange(ref.shape[0]) < n)[:, None], x.shape)
    triton.store(ref, x.astype(ref.dtype), mask=mask)
