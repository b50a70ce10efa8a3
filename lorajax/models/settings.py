"""What every model's configuration shares: how it is executed, and how a Hugging Face `config.json` is read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _exact_gelu(x: jax.Array) -> jax.Array:
    # By erf in float32, as torch has it. `jax.nn.gelu` calls erfc, exact far below 0 as well, which is 67 operations
    # for each element in place of 7: on a GPU more time than reading and writing it.
    wide = x if jnp.finfo(x.dtype).bits > 32 else x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


# Its input alone is kept for the backward pass. Of the others XLA's GPU compiler sees to that; these it takes for too
# dear to compute again, and writes three arrays of a model's widest size in place of one.
_gelu, _gelu_tanh = jax.checkpoint(_exact_gelu), jax.checkpoint(partial(jax.nn.gelu, approximate=True))

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""`hidden_act` names of Hugging Face; `gelu` is the exact one (erf)."""

PRODUCT = "product"
"""The name (`jax.ad_checkpoint.checkpoint_name`) that who computes a product with a weight in parts gives the sum."""
REMAT_POLICIES = (
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)
REMAT = ("none", "attention", "fused", "full", *REMAT_POLICIES)
_KINDS: Mapping[str, type] = {"int": Integral, "float": Real, "str": str}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model runs, whatever its architecture; results are the same up to rounding.

    dtype: computation dtype of the matrix products; norms and softmax run in float32.
    param_dtype: dtype of the stored parameters.
    scan_layers: one stacked tree `layers` (leading axis = layer) run by `lax.scan`, instead of `layer_0`, `layer_1`...
    remat: what the backward pass computes again of each layer. 'none'; 'attention', all but the products with weights
        and the fused attention (`keeps_products`): norms, activations and, without the fused kernel, the attention's
        probabilities; 'fused', all but the fused attention, an array of the layer's width; 'full', everything; or a
        name in `jax.checkpoint_policies` (see `REMAT_POLICIES`).
    rows: sharding of the rows of what flows from layer to layer, on a mesh; None leaves it to the compiler, which under
        FSDP may well cut features instead of rows. No number depends on it.
    attention: implementation given to `jax.nn.dot_product_attention`: None (JAX chooses), 'xla', 'cudnn' (fused, on
        NVIDIA GPUs with a 16-bit dtype, a head size that 8 divides and, with a mask, even lengths) or 'auto', cudnn
        where that is so (asked when the model is traced) and None elsewhere; under a vmap over runs
        `attention.side_by_side`. Causal mask and window are the kernel's own. Padding, segments of packed rows and
        caches reach it as a 16-bit bias (B, 1, T, S) for each query and key; the probabilities, (B, N, T, S), are never
        formed. Dropout of these needs them, so it takes the plain path. A function of q, k, v and `attend`'s mask,
        bias, causal, window and scale is called in its place (`short_attention`, for up to 128 tokens).
    """

    dtype: Any = field(default=jnp.float32)
    param_dtype: Any = field(default=jnp.float32)
    scan_layers: bool = False
    remat: str = "none"
    attention: Literal["xla", "cudnn", "auto"] | Callable[..., Any] | None = None
    rows: Any = None

    def __post_init__(self) -> None:
        for one in fields(self):  # a config.json may say anything
            value, kind = getattr(self, one.name), _KINDS.get(str(one.type))
            if kind and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{one.name}={value!r} of {type(self).__name__} is no {one.type}: see config.json")
        choice("remat", self.remat, REMAT)


def policy(remat: str) -> Any:
    """The `jax.checkpoint` policy of a `remat` other than 'none'; None keeps nothing but the layer's input."""
    known = {"full": None, "fused": keeps_attention, "attention": keeps_products}
    return known[remat] if remat in known else getattr(jax.checkpoint_policies, remat)


_named = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def keeps_attention(primitive: Any, *types: Any, **params: Any) -> bool:
    """A `jax.checkpoint` policy: keeps what cuDNN's attention returns, so that it is not run twice."""
    return primitive.name.startswith("dot_product_attention")


def keeps_products(primitive: Any, *types: Any, **params: Any) -> bool:
    """A `jax.checkpoint` policy: keeps products with weights (matmuls without batch dimensions, convolutions, sums
    named `PRODUCT`) and what cuDNN's attention returns. That is a primitive of its own, neither a product nor named: a
    policy that keeps dots alone runs the attention twice."""
    if keeps_attention(primitive) or primitive.name == "conv_general_dilated":
        return True
    return _named(primitive, *types, **params) or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *types, **params)


def pinned(run: Execution, x: jax.Array) -> jax.Array:
    """x, its rows where `run.rows` says and all else of it whole."""
    return x if run.rows is None else jax.lax.with_sharding_constraint(x, run.rows)


def choice(name: str, value: str, known: Sequence[str]) -> None:
    """Error: ValueError with the nearest name unless `value` is one of `known`."""
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} {value!r} is not implemented; this model has: {', '.join(known)}{hint}")


def read_keys(config: Mapping[str, Any], required: Mapping[str, str], optional: Mapping[str, str]) -> dict[str, Any]:
    """Fields (ours) from the keys (theirs) of a config.json; `optional` ones only where they are there and not null.

    Error: ValueError that names the required keys which are missing, and those that are no text and no number.
    """
    missing = sorted(key for key in required if key not in config)
    if missing:
        raise ValueError(f"config.json lacks {missing}; it has {sorted(config)}")
    found = {ours: config[theirs] for theirs, ours in required.items()}
    odd = {key: config[key] for key in required if config[key] is None or isinstance(config[key], Mapping | bool)}
    if odd:
        raise ValueError(f"config.json has {odd}: each must be a number or a name")
    return found | {ours: config[theirs] for theirs, ours in optional.items() if config.get(theirs) is not None}


def number_of_labels(config: Mapping[str, Any]) -> int:
    """`num_labels`, or the size of `id2label`, or Hugging Face's default 2."""
    return config.get("num_labels") or len(config.get("id2label") or ()) or 2


def looked_up(run: Execution, table: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
    """table(ids), (B, T) to (B, T, D), its rows where `run.rows` says. Where these lie along several axes of the mesh,
    a table's width lies along the last one (`fsdp`): a device looks up its part of the width for all rows that it
    shares with others along that axis, which then exchange rows for width. XLA alone may give every device all rows,
    and the whole vocabulary."""
    axes = None if run.rows is None else next(iter(run.rows.spec), None)
    if run.rows is None or not isinstance(axes, tuple) or len(axes) < 2:
        return table(ids)
    at = lambda *spec: NamedSharding(run.rows.mesh, PartitionSpec(*spec))  # noqa: E731
    x = table(jax.lax.with_sharding_constraint(ids, at(axes[:-1])))
    return pinned(run, jax.lax.with_sharding_constraint(x, at(axes[:-1], None, axes[-1])))
