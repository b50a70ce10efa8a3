"""Vision transformers in plain Flax Linen: ViT (Dosovitskiy et al. 2021, arXiv:2010.11929), DINOv2 (arXiv:2304.07193).

    params/embeddings/{cls_token (1, 1, D), position_embeddings (1, 1 + N, D)}
    params/embeddings/patch/{kernel (P, P, C, D), bias}
    params/layer_i/{attention_norm,ffn_norm}/{scale,bias}
    params/layer_i/attention/{query,key,value,output}/{kernel,bias}      params/layer_i/ffn/{up,down}/{kernel,bias}
    params/layer_i/{attention_scale,ffn_scale}/scale                     DINOv2
    params/norm/{scale,bias}    params/classifier/{kernel,bias}

With `scan_layers` the layers are one subtree `params/layers` whose leaves have a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorajax.models.attention import Attention
from lorajax.models.checkpoint import Layout, Tensor, layout, linears, norms
from lorajax.models.layers import Context, FeedForward, add_layers, run_layers
from lorajax.models.norms import LayerNorm
from lorajax.models.settings import ACTIVATIONS, Execution, choice, number_of_labels, read_keys


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Execution):
    """Architecture of `ViT`; how it is executed is in `Execution`. Field defaults are those of ViT-B/16.

    family: 'vit' or 'dinov2'; DINOv2 scales what each block adds, and its head sees the first token beside the mean of
    the patches. image_size: of the position embeddings; other sizes get interpolated ones. num_labels: 0 = no head.
    """

    family: str = "vit"
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    query_bias: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    num_labels: int = 2
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("vit", "dinov2"))
        choice("activation (hidden_act)", self.activation, tuple(ACTIVATIONS))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> ViTConfig:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win.

        Errors: ValueError for a feed-forward block or activation that is not implemented, and for a missing key.
        """
        family = str(config.get("model_type"))
        choice("model_type", family, ("vit", "dinov2"))
        if config.get("use_swiglu_ffn"):
            raise ValueError("use_swiglu_ffn is true in this config.json; this model has the plain feed-forward block")
        fields = read_keys(config, _REQUIRED, _OPTIONAL)
        if family == "dinov2":
            fields["intermediate_size"] = int(fields["hidden_size"] * config.get("mlp_ratio", 4))
        fields |= {"family": family, "num_labels": number_of_labels(config)}
        return cls(**(fields | overrides))


class Embeddings(nn.Module):
    """Patches, projected, behind the first token, with positions: pixels (B, H, W, C) -> (B, 1 + N, D)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        for name, size in (("height", pixels.shape[1]), ("width", pixels.shape[2])):
            if size % c.patch_size:
                raise ValueError(f"{name} {size} is not a multiple of the patch size {c.patch_size}: resize the images")
        init, side = nn.initializers.normal(c.initializer_range), c.image_size // c.patch_size
        patch = nn.Conv(
            c.hidden_size, (c.patch_size,) * 2, strides=(c.patch_size,) * 2, padding="VALID", kernel_init=init,
            dtype=c.dtype, param_dtype=c.param_dtype, name="patch",
        )  # fmt: skip
        first = self.param("cls_token", init, (1, 1, c.hidden_size), c.param_dtype)
        positions = self.param("position_embeddings", init, (1, 1 + side * side, c.hidden_size), c.param_dtype)
        x = patch(pixels.astype(c.dtype))
        rows, columns = x.shape[1:3]
        if (rows, columns) != (side, side):
            positions = interpolated(positions, side, rows, columns)
        x = x.reshape(x.shape[0], -1, c.hidden_size).astype(jnp.float32)
        first = jnp.broadcast_to(first, (x.shape[0], 1, c.hidden_size)).astype(jnp.float32)
        return (jnp.concatenate([first, x], axis=1) + positions.astype(jnp.float32)).astype(c.dtype)


def interpolated(positions: jax.Array, side: int, rows: int, columns: int) -> jax.Array:
    """Position embeddings (1, 1 + side^2, D) for a grid of rows x columns, bicubic as PyTorch does it, float32."""
    grid = positions[0, 1:].astype(jnp.float32).reshape(side, side, -1)
    by_row, by_column = (jnp.asarray(_bicubic(side, size)) for size in (rows, columns))
    grid = jnp.einsum("ri,cj,ijd->rcd", by_row, by_column, grid)
    return jnp.concatenate([positions[:, :1].astype(jnp.float32), grid.reshape(1, rows * columns, -1)], axis=1)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of cubic convolution with a = -0.75, pixels at half-integers, edges repeated."""
    weights = np.zeros((new, old), np.float32)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t = abs(centre - j)
            near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[i, min(max(j, 0), old - 1)] += near if t <= 1 else far
    return weights


class LayerScale(nn.Module):
    """x times a learned vector."""

    run: Execution
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.size,), self.run.param_dtype)
        return x * scale.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)


class ViT(nn.Module):
    """The encoder with its head. `pixel_values` (B, H, W, C), channels last, unlike Hugging Face's.

    `deterministic=False` is training with dropout: it needs `rngs={'dropout': key}` in `apply`.
    """

    config: ViTConfig
    deterministic: bool = True

    def setup(self) -> None:
        c, std = self.config, self.config.initializer_range
        norm = partial(LayerNorm, c, c.hidden_size, c.norm_eps)
        bias = (c.query_bias, c.query_bias, c.query_bias, True)
        fields: dict[str, Any] = {
            "make_norm": norm,
            "make_attention": partial(
                Attention, c, c.hidden_size, c.num_heads, c.num_heads, c.hidden_size // c.num_heads, bias, std,
                dropout=c.attention_dropout, deterministic=self.deterministic,
            ),
            "make_ffn": partial(FeedForward, c, c.hidden_size, c.intermediate_size, c.activation, init_std=std),
            "make_scale": partial(LayerScale, c, c.hidden_size) if c.family == "dinov2" else None,
            "dropout": c.hidden_dropout, "deterministic": self.deterministic,
        }  # fmt: skip
        self.embeddings = Embeddings(c)
        self.drop = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)
        add_layers(self, c, c.num_layers, lambda _: fields)
        self.norm = norm()
        if c.num_labels:
            init = nn.initializers.normal(std)
            self.classifier = nn.Dense(c.num_labels, dtype=jnp.float32, param_dtype=c.param_dtype, kernel_init=init)

    def hidden(self, pixel_values: jax.Array) -> jax.Array:
        """Last hidden states after the norm, (B, 1 + N, D) in `config.dtype`: the first token, then the patches."""
        x = self.drop(self.embeddings(pixel_values))
        return self.norm(run_layers(self, self.config, x, Context())[0])

    def features(self, pixel_values: jax.Array) -> jax.Array:
        """What the head sees, float32: the first token (B, D), with 'dinov2' beside the mean patch (B, 2 D)."""
        x = self.hidden(pixel_values).astype(jnp.float32)
        if self.config.family == "vit":
            return x[:, 0]
        return jnp.concatenate([x[:, 0], x[:, 1:].mean(axis=1)], axis=1)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Logits, float32 (B, num_labels); without a head, `features`."""
        x = self.features(pixel_values)
        return self.classifier(x) if self.config.num_labels else x


@layout.register
def _(config: ViTConfig) -> Layout:
    """Prefix `vit.` or `dinov2.`; transformers 5 names the modules otherwise than the files."""
    c, prefix = config, f"{config.family}."
    tables = ("cls_token", "position_embeddings")
    tensors = {f"params/embeddings/{name}": Tensor((f"embeddings.{name}",)) for name in tables}
    tensors |= linears({"params/embeddings/patch": "embeddings.patch_embeddings.projection"}, kernel="conv")
    for i in range(c.num_layers):
        ours, theirs = f"params/layer_{i}", f"encoder.layer.{i}"
        names = ("layernorm_before", "layernorm_after") if c.family == "vit" else ("norm1", "norm2")
        tensors |= norms({f"{ours}/attention_norm": f"{theirs}.{names[0]}", f"{ours}/ffn_norm": f"{theirs}.{names[1]}"})
        names = ("intermediate.dense", "output.dense") if c.family == "vit" else ("mlp.fc1", "mlp.fc2")
        for name in ("query", "key", "value"):
            tensors |= linears({f"{ours}/attention/{name}": f"{theirs}.attention.attention.{name}"})
            if not c.query_bias:
                del tensors[f"{ours}/attention/{name}/bias"]
        tensors |= linears({f"{ours}/attention/output": f"{theirs}.attention.output.dense"})
        tensors |= linears({f"{ours}/ffn/up": f"{theirs}.{names[0]}", f"{ours}/ffn/down": f"{theirs}.{names[1]}"})
        if c.family == "dinov2":
            for j, name in enumerate(("attention", "ffn"), start=1):
                tensors[f"{ours}/{name}_scale/scale"] = Tensor((f"{theirs}.layer_scale{j}.lambda1",))
    tensors |= norms({"params/norm": "layernorm"})
    if c.num_labels:
        tensors |= linears({"params/classifier": "classifier"})
    return Layout(
        tensors,
        ViT(c),
        (jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.channels), jnp.float32),),
        prefix=prefix,
        bare=r"classifier\..*",
        modules=(
            (r"attention\.attention\.(q|k|v)(uery|ey|alue)$", r"attention.\1_proj"),
            (r"attention\.output\.dense$", "attention.o_proj"),
            *(((r"intermediate\.dense$", "mlp.fc1"), (r"output\.dense$", "mlp.fc2")) if c.family == "vit" else ()),
            *(((r"encoder\.layer\.", "layers."),) if c.family == "vit" else ()),
        ),
        unused=(r"pooler\.dense\..*", r"embeddings\.mask_token"),
        head=r"(classifier)\..*",
        init_std=c.initializer_range,
    )


_REQUIRED = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_act": "activation",
}
_OPTIONAL = {
    "num_channels": "channels",
    "intermediate_size": "intermediate_size",
    "layer_norm_eps": "norm_eps",
    "qkv_bias": "query_bias",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "initializer_range",
}
