"""ResNet in plain Flax Linen (He et al. 2016, arXiv:1512.03385; stride in the 3x3 convolution, as in PyTorch).

    params/stem/conv/kernel          params/stem/norm/{scale,bias}       batch_stats/stem/norm/{mean,var}
    params/stage_i/block_j/unit_k/conv/kernel, .../norm/{scale,bias}     k = 0, 1 basic; 0, 1, 2 bottleneck
    params/stage_i/block_j/shortcut/conv/kernel, .../norm/{scale,bias}   where shape or size changes
    params/classifier/{kernel,bias}

Every convolution's norm has its running statistics under the same path in the collection `batch_stats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.checkpoint import Layout, Tensor, layout, linears
from lorajax.models.settings import ACTIVATIONS, REMAT, choice, number_of_labels, policy, read_keys


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Architecture of `ResNet`. Field defaults are those of ResNet-50.

    kind: 'basic' (two 3x3 convolutions) or 'bottleneck' (1x1, 3x3, 1x1 with a quarter of the channels inside).
    early_stride: the bottleneck's first convolution has the stride, not its second. first_stride: the first stage
    halves the image too. num_labels: 0 = no head.
    dtype: computation dtype of the convolutions; param_dtype: of the stored parameters. remat: what the backward pass
    computes again of each block, see `Execution`.
    """

    channels: int = 3
    stem_size: int = 64
    sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    kind: str = "bottleneck"
    activation: str = "relu"
    early_stride: bool = False
    first_stride: bool = False
    num_labels: int = 2
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    def __post_init__(self) -> None:
        choice("remat", self.remat, REMAT)
        choice("kind (layer_type)", self.kind, ("basic", "bottleneck"))
        choice("activation (hidden_act)", self.activation, tuple(ACTIVATIONS))
        if len(self.sizes) != len(self.depths):
            raise ValueError(f"sizes {self.sizes} and depths {self.depths} have different numbers of stages")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> ResNetConfig:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win."""
        choice("model_type", str(config.get("model_type")), ("resnet",))
        fields = read_keys(config, _REQUIRED, _OPTIONAL) | {"num_labels": number_of_labels(config)}
        fields |= {name: tuple(fields[name]) for name in ("sizes", "depths")}
        return cls(**(fields | overrides))

    def units(self, stage: int, block: int) -> tuple[tuple[int, int, int], ...]:
        """(channels, window, stride) of each convolution of a block."""
        size = self.sizes[stage]
        stride = 2 if block == 0 and (stage > 0 or self.first_stride) else 1
        if self.kind == "basic":
            return (size, 3, stride), (size, 3, 1)
        first, second = (stride, 1) if self.early_stride else (1, stride)
        return (size // 4, 1, first), (size // 4, 3, second), (size, 1, 1)

    def has_shortcut(self, stage: int, block: int) -> bool:
        """Whether a block's input is projected: where its number of channels or its size changes."""
        before = self.stem_size if stage == 0 else self.sizes[stage - 1]
        stride = max(unit[2] for unit in self.units(stage, block))
        return block == 0 and (stride > 1 or before != self.sizes[stage])


class Unit(nn.Module):
    """Convolution and batch norm: (B, H, W, C) -> (B, H / stride, W / stride, features)."""

    config: ResNetConfig
    features: int
    window: int
    stride: int
    train: bool

    def setup(self) -> None:
        c = self.config
        self.conv = nn.Conv(
            self.features, (self.window,) * 2, strides=(self.stride,) * 2, padding=self.window // 2, use_bias=False,
            dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=nn.initializers.he_normal(),
        )  # fmt: skip
        self.norm = nn.BatchNorm(not self.train, momentum=0.9, epsilon=1e-5, dtype=c.dtype, param_dtype=c.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Block(nn.Module):
    """Units with ReLU between them whatever the activation (as in `transformers`), plus the (projected) input, then the
    activation."""

    config: ResNetConfig
    stage: int
    block: int
    train: bool

    def setup(self) -> None:
        c, units = self.config, self.config.units(self.stage, self.block)
        self.unit = [Unit(c, *unit, train=self.train) for unit in units]
        self.projects = c.has_shortcut(self.stage, self.block)
        if self.projects:
            self.shortcut = Unit(c, units[-1][0], 1, max(unit[2] for unit in units), train=self.train)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.config.activation]
        y = x
        for i, unit in enumerate(self.unit):
            y = unit(jax.nn.relu(y) if i else y)
        return act(y + (self.shortcut(x) if self.projects else x))


class Stage(nn.Module):
    """The blocks of one size."""

    config: ResNetConfig
    stage: int
    train: bool

    def setup(self) -> None:
        c = self.config
        block = Block if c.remat == "none" else nn.remat(Block, policy=policy(c.remat))
        self.block = [block(c, self.stage, i, self.train) for i in range(c.depths[self.stage])]

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.block:
            x = block(x)
        return x


class ResNet(nn.Module):
    """The network with its head. `pixel_values` (B, H, W, C), channels last, unlike Hugging Face's.

    train: norms use the batch's statistics and update the running ones, for which `apply` needs
    `mutable=['batch_stats']`; otherwise they use the running ones and change nothing.
    """

    config: ResNetConfig
    train: bool = False

    def setup(self) -> None:
        c = self.config
        self.stem = Unit(c, c.stem_size, 7, 2, self.train)
        self.stage = [Stage(c, i, self.train) for i in range(len(c.sizes))]
        if c.num_labels:
            self.classifier = nn.Dense(c.num_labels, dtype=jnp.float32, param_dtype=c.param_dtype)

    def features(self, pixel_values: jax.Array) -> jax.Array:
        """Mean over the last stage's image, float32 (B, sizes[-1])."""
        c = self.config
        x = ACTIVATIONS[c.activation](self.stem(pixel_values.astype(c.dtype)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stage:
            x = stage(x)
        return x.astype(jnp.float32).mean(axis=(1, 2))

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Logits, float32 (B, num_labels); without a head, `features`."""
        x = self.features(pixel_values)
        return self.classifier(x) if self.config.num_labels else x


@layout.register
def _(config: ResNetConfig) -> Layout:
    """Prefix `resnet.`; the counters of batch norms are dropped."""
    modules = {"stem": "embedder.embedder"}
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            ours, theirs = f"stage_{i}/block_{j}", f"encoder.stages.{i}.layers.{j}"
            modules |= {f"{ours}/unit_{k}": f"{theirs}.layer.{k}" for k in range(len(config.units(i, j)))}
            if config.has_shortcut(i, j):
                modules[f"{ours}/shortcut"] = f"{theirs}.shortcut"
    tensors = {}
    for path, name in modules.items():
        tensors[f"params/{path}/conv/kernel"] = Tensor((f"{name}.convolution.weight",), "conv")
        for leaf, weight in {"scale": "weight", "bias": "bias"}.items():
            tensors[f"params/{path}/norm/{leaf}"] = Tensor((f"{name}.normalization.{weight}",))
        for leaf in ("mean", "var"):
            tensors[f"batch_stats/{path}/norm/{leaf}"] = Tensor((f"{name}.normalization.running_{leaf}",))
    if config.num_labels:
        tensors |= linears({"params/classifier": "classifier.1"})
    return Layout(
        tensors,
        ResNet(config),
        (jax.ShapeDtypeStruct((1, 32, 32, config.channels), jnp.float32),),
        prefix="resnet.",
        bare=r"classifier\..*",
        unused=(r".*\.num_batches_tracked",),
        head=r"(classifier)\..*",
    )


_REQUIRED = {
    "embedding_size": "stem_size",
    "hidden_sizes": "sizes",
    "depths": "depths",
    "layer_type": "kind",
    "hidden_act": "activation",
}
_OPTIONAL = {
    "num_channels": "channels",
    "downsample_in_bottleneck": "early_stride",
    "downsample_in_first_stage": "first_stride",
}
