"""X-LoRA: a small classifier weighs trained adapters per token, in two passes (Buehler and Buehler, arXiv 2402.07148);
and weights per sequence by likeness to each task's inputs (LoraRetriever, arXiv 2402.09997).

    experts = arrow([one, two, three])                      # the adapters side by side; their own routing is not used
    net = XLoRA(width=hidden_size, experts=3)
    params = net.init(key)                                  # all that trains
    logits, p = net.two_pass(params, hidden, forward, experts.adapt, experts.adapt.bind(*experts[1:]), ids, mask)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.core.adapt import Adapt
from lorajax.core.variant import Full
from lorajax.variants.given import given
from lorajax.variants.kaiming import kaiming
from lorajax.variants.molora import probabilities


@dataclass(frozen=True)
class XLoRA:
    """``p(h) = global_scale softmax(f(h) / temperature)``, f a perceptron on the last hidden state h of every token,
    found by a first pass with all experts at `placeholder`; the second pass weighs them by p (arXiv 2402.07148).

    width: of h. experts: n. layers: how many weights have weights of their own, 0 for one p for all (PEFT's default;
    the paper: each layer). depth: linear maps in f, with ReLU between (1); size: of those inside (2048). top_k: softmax
    over the k largest only (0: all). placeholder: of the first pass: 0, the base alone (PEFT), or the paper's code's
    1 / n. No gradient passes through the first pass, as in both; a cache of keys and values of the first pass must not
    serve the second.
    """

    width: int
    experts: int
    layers: int = 0
    depth: int = 1
    size: int = 2048
    temperature: float = 1.0
    top_k: int = 0
    placeholder: float = 0.0
    global_scale: float = 1.0

    def __post_init__(self):
        if min(self.width, self.experts, self.depth, self.size) < 1 or self.layers < 0:
            raise ValueError(f"{self}: width, experts, depth and size must be at least 1, layers at least 0")
        if not 0 <= self.top_k <= self.experts or not self.temperature > 0:
            raise ValueError(f"top_k={self.top_k} must be in 0..{self.experts}, temperature={self.temperature} above 0")

    def init(self, key: jax.Array) -> list[dict[str, jax.Array]]:
        """[{'w': (in, out), 'b': (out,)}, ...], uniform on +-1/sqrt(in)."""
        sizes = [self.width, *[self.size] * (self.depth - 1), self.experts * max(1, self.layers)]
        keys = jax.random.split(key, 2 * self.depth).reshape(self.depth, 2)
        return [{"w": kaiming(k[0], (m, n), m), "b": kaiming(k[1], (n,), m)}
                for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def weights(self, params: Sequence[dict[str, jax.Array]], h: jax.Array) -> jax.Array:
        """h (rows..., width) -> (rows..., experts), or (layers, rows..., experts), float32."""
        x = h.astype(jnp.float32)
        for i, layer in enumerate(params):
            x = jax.nn.relu(x) if i else x
            x = jnp.einsum("...i,io->...o", x, layer["w"]) + layer["b"].reshape(*[1] * (x.ndim - 1), -1)
        x = x.reshape(*x.shape[:-1], max(1, self.layers), self.experts)
        p = self.global_scale * probabilities(x, "softmax", self.top_k, self.temperature)
        return jnp.moveaxis(p, -2, 0) if self.layers else p[..., 0, :]

    def two_pass(self, params: Any, hidden: Callable[..., jax.Array], forward: Callable[..., Any], adapt: Adapt,
                 bound: Any, *args: Any) -> tuple[Any, jax.Array]:
        """(what `forward` returns, the weights). hidden, forward: lifted functions of (bound, *args); hidden returns
        (rows..., width). bound: `adapt`'s, of the experts. Raises ValueError where layers are not those of `adapt`."""
        counts = {path: adapt.sites[path].extent(adapt.sites[path].stack_axes) for path, choice in adapt.plan.items()
                  if not isinstance(choice, Full)}
        if self.layers not in (0, sum(counts.values())):
            raise ValueError(f"layers={self.layers}, and {sum(counts.values())} matrices have experts: give that many, "
                             f"or 0 for the same weights at all of them")
        shape = jax.eval_shape(hidden, bound, *args).shape[:-1]
        first = given(bound, jnp.full((*shape, self.experts), self.placeholder))
        p = self.weights(params, jax.lax.stop_gradient(hidden(first, *args)))
        if not self.layers:
            return forward(given(bound, p), *args), p
        each, start = {}, 0
        for path, count in counts.items():
            each[path] = p[start:start + count].reshape(*adapt.sites[path].stack_shape, *p.shape[1:])
            start += count
        return forward(given(bound, each), *args), p


def by_likeness(features: jax.Array, mask: jax.Array, tasks: jax.Array, *, temperature: float = 0.1,
                top_k: int = 0) -> jax.Array:
    """Input-dependent merging: ``p = softmax(cos(mean of real tokens, task) / temperature)`` for each sequence (arXiv
    2402.09997 retrieves the most alike; the softmax is ours), as (batch, tokens, experts) for
    `given`.

    features: (batch, tokens, width), of the base, such as embeddings or hidden states. mask: (batch, tokens), 0 for
    padding. tasks: (experts, width), the mean over some inputs of each task (`centroid`).
    """
    cosines = jnp.einsum("bd,ed->be", _unit(centroid(features, mask)), _unit(tasks), precision="highest")
    p = probabilities(cosines, "softmax", top_k, temperature)
    return jnp.broadcast_to(p[:, None, :], (*mask.shape, p.shape[-1]))


def centroid(features: jax.Array, mask: jax.Array) -> jax.Array:
    """(batch, width): the mean over real tokens."""
    real = mask.astype(jnp.float32)[..., None]
    return jnp.sum(features.astype(jnp.float32) * real, 1) / jnp.maximum(jnp.sum(real, 1), 1.0)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True)), 1e-12)
