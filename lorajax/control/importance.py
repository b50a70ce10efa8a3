"""How much each site matters: scores from gradients, and the spectrum of each update without forming it.

`lorajax.control.ranks` distributes a budget by such scores. A stacked site (scanned layers) has one rank for all of its
matrices, so its score is the mean over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.control.adalora import moving_averages
from lorajax.core.layout import over_stack
from lorajax.core.variant import Factors, Full


def gradient_norm(adapter: Any, grads: Any) -> jax.Array:
    """``||dL/d(A, B, ...)||_F`` of one matrix's adapter."""
    return jnp.sqrt(fisher(adapter, grads))


def fisher(adapter: Any, grads: Any) -> jax.Array:
    """Sum of g^2: the trace of the empirical Fisher matrix, where each batch is one example."""
    return _total(jnp.square(g) for g in jax.tree.leaves(grads))


def sensitivity(adapter: Any, grads: Any) -> jax.Array:
    """Sum of |w g|: to first order, by how much the loss changes where an element is set to 0."""
    return _total(jnp.abs(w * g) for w, g in zip(jax.tree.leaves(adapter), jax.tree.leaves(grads), strict=True))


METRICS: Mapping[str, Callable[[Any, Any], jax.Array]] = {
    "gradient_norm": gradient_norm, "fisher": fisher, "sensitivity": sensitivity,
}

Gradient = Callable[..., Any]
"""(trainable, batch, *rest) -> gradients like trainable."""


def importance(adapt: Any, gradient: Gradient, trainable: Any, batches: Iterable[Any], metric: str = "gradient_norm",
               *, rest: tuple[Any, ...] = (), per_example: bool = False, by_size: bool = False) -> dict[str, float]:
    """site path -> score, the mean over `batches`, for every site that has an adapter.

    metric: a row of `METRICS`. per_example: score each example alone (leaves of a batch have a leading axis of them),
    as the Fisher matrix is defined; without it the gradient of a batch's mean is scored, which is what is mostly done.
    by_size: divide by the square root of the number of elements, so that a wide site does not win by its width.
    rest: further arguments of `gradient`. What is large (the frozen partition) goes here: arrays that `gradient` closes
    over become constants of the program.

    In a fresh LoRA B is 0 and with it A's gradient, so all sensitivities are 0: use ``gradient_norm``, or train first.
    ValueError for an unknown metric or for no batch.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; there are {', '.join(METRICS)}")

    def one(trainable: Any, batch: Any, *rest: Any) -> dict[str, jax.Array]:
        return _scores(adapt, METRICS[metric], trainable, gradient(trainable, batch, *rest), by_size)

    def each(trainable: Any, batch: Any, *rest: Any) -> dict[str, jax.Array]:
        rows = jax.tree.map(lambda x: x[:, None], batch)
        return jax.tree.map(jnp.mean, jax.vmap(lambda row: one(trainable, row, *rest))(rows))

    score = jax.jit(each if per_example else one)
    scores = [score(trainable, batch, *rest) for batch in batches]
    if not scores:
        raise ValueError("no batch to score: give at least one")
    return {path: float(sum(found[path] for found in scores)) / len(scores) for path in scores[0]}


def smoothed_sensitivity(adapt: Any, gradient: Gradient, trainable: Any, batches: Iterable[Any], *,
                         rest: tuple[Any, ...] = (), beta1: float = 0.85, beta2: float = 0.85,
                         by_size: bool = False) -> dict[str, float]:
    """site path -> AdaLoRA's score (arXiv 2303.10512, equations 8 to 10) over `batches` in their order: the moving
    average of |w g| times that of its deviation, element by element, then summed."""
    paths = [path for path, choice in adapt.plan.items() if not isinstance(choice, Full)]

    @jax.jit
    def step(trainable: Any, batch: Any, averages: Any, *rest: Any) -> Any:
        grads = gradient(trainable, batch, *rest)
        sensed = {path: jax.tree.map(lambda w, g: jnp.abs(_wide(w) * _wide(g)), trainable[path], grads[path])
                  for path in paths}
        mean, deviation = averages
        return moving_averages(sensed, mean, deviation, beta1, beta2)

    zeros = {path: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable[path]) for path in paths}
    averages, count = (zeros, zeros), 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        averages = step(trainable, batch, averages, *rest)
    if not count:
        raise ValueError("no batch to score: give at least one")
    product = jax.jit(lambda mean, deviation: _scores(adapt, sensitivity, mean, deviation, by_size))
    return {path: float(x) for path, x in product(*averages).items()}


def spectra(adapt: Any, trainable: Any, frozen: Any) -> dict[str, jax.Array]:
    """site path -> the singular values of its update, (stack..., rank) float32, largest first.

    By ``sigma(s A B) = sigma(s R_A R_B^T)`` with the R of QR(A) and QR(B^T): O((in + out) rank^2), nothing of the
    weight's size. ValueError for a variant whose update has no factors, or that also scales the weight (DoRA).
    """
    found = {}
    for path, choice in adapt.plan.items():
        if isinstance(choice, Full):
            continue
        adapter = trainable[path]
        if path in frozen.aux:
            halves = zip(adapter, frozen.aux[path], strict=True)
            adapter = type(adapter)(*[train if fixed is None else fixed for train, fixed in halves])
        shared = adapt.shared(path, trainable, frozen)
        spectrum = functools.partial(_spectrum, path, choice, shared)
        found[path] = over_stack(adapt.sites[path], spectrum)(adapter)
    return found


def effective_rank(sigma: jax.Array) -> jax.Array:
    """(..., r) -> (...): exp of the entropy of sigma / sum(sigma) (Roy and Vetterli); 0 where all are 0."""
    total = jnp.sum(sigma, -1, keepdims=True)
    p = sigma / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)


def stable_rank(sigma: jax.Array) -> jax.Array:
    """(..., r) -> (...): ``||.||_F^2 / ||.||_2^2``; 0 where all are 0."""
    largest = jnp.max(jnp.square(sigma), -1)
    return jnp.where(largest > 0, jnp.sum(jnp.square(sigma), -1) / jnp.where(largest > 0, largest, 1.0), 0.0)


def energy_rank(sigma: jax.Array, share: float = 0.9) -> jax.Array:
    """(..., r), largest first -> (...) int32: the least k whose first k squares make up `share` of all; 0 for zeros."""
    energy = jnp.cumsum(jnp.square(sigma), -1)
    below = jnp.sum(energy < share * energy[..., -1:], -1).astype(jnp.int32)
    return jnp.where(energy[..., -1] > 0, jnp.minimum(below + 1, sigma.shape[-1]), 0)


def _spectrum(path: str, choice: Any, shared: Any, adapter: Any) -> jax.Array:
    plain = choice.factored and not choice.reads_weight and not choice.routed
    update = choice.factors(adapter._replace(**shared), None).folded() if plain else Factors()
    a, b, s = update.a, update.b, update.s
    if a is None or b is None or update.g is not None or update.g_in is not None:
        raise ValueError(f"{path}: the update of {type(choice).__name__} is no product of two factors, so its spectrum "
                         f"takes the dense update: use numpy.linalg.svd on delta, or leave the site out")
    with jax.default_matmul_precision("highest"):
        core = jnp.linalg.qr(_wide(a), mode="r") @ jnp.linalg.qr(_wide(b).T, mode="r").T
    sigma = jnp.linalg.svd(core, compute_uv=False)
    return sigma if s is None else sigma * jnp.abs(jnp.float32(s))


def _scores(adapt: Any, metric: Any, trainable: Any, grads: Any, by_size: bool) -> dict[str, jax.Array]:
    """path -> () float32, the mean of `metric` over the site's matrices."""
    scores = {}
    for path, choice in adapt.plan.items():
        if isinstance(choice, Full):
            continue
        site = adapt.sites[path]
        wide = (jax.tree.map(_wide, trainable[path]), jax.tree.map(_wide, grads[path]))
        size = sum(x.size for x in jax.tree.leaves(trainable[path])) // site.extent(site.stack_axes)
        scores[path] = jnp.mean(over_stack(site, metric)(*wide)) / (size**0.5 if by_size else 1.0)
    return scores


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return sum((jnp.sum(x) for x in parts), start=jnp.float32(0.0))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
