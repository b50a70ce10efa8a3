"""Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290) against the base under the adapter.

The reference is the policy with its adapter off: the same frozen arrays, of which there is one copy. So a step takes
what it takes anyway, and two forward passes instead of one::

    loss = make_dpo_loss(log_probs, beta=0.1)              # log_probs(params, batch, key) -> (B, 2)
    step = make_step(loss, WithReference(adapt), tx)       # `lorajax.train.step`; batches of `lorajax.data.Preferences`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.variant import Full
from lorajax.train.step import Loss

Kind = Literal["dpo", "ipo"]
LogProbs = Callable[[Any, Any, jax.Array | None], jax.Array]
"""(params, bound or plain; batch; key of the model's dropout or None) -> (B, 2) float32: log-probability of the chosen
and of the rejected completion, summed over its tokens."""


class Policy(NamedTuple):
    """policy: bound params. reference: the plain params under them, the same arrays."""

    policy: Any
    reference: Any


class WithReference(NamedTuple):
    """An `Adapt` whose `bind` returns a `Policy`: for `make_step` and `make_eval`, in place of the `Adapt` itself."""

    adapt: Adapt

    def bind(self, trainable: Mapping[str, Any], frozen: Frozen, **named: Any) -> Policy:
        return Policy(self.adapt.bind(trainable, frozen, **named), reference(self.adapt, frozen))

    def penalty(self, trainable: Mapping[str, Any]) -> jax.Array:
        return self.adapt.penalty(trainable)


def reference(adapt: Adapt, frozen: Frozen) -> Any:
    """The params of the base, from the frozen partition; no array is copied.

    Raises ValueError where the base is not all there: weights that `Full` trains, or that a start has rewritten.
    """
    full = [path for path, choice in adapt.plan.items() if isinstance(choice, Full)]
    if full:
        raise ValueError(f"{full[0]!r} (and {len(full) - 1} other paths) trains the weight itself, so the reference is "
                         f"not in the frozen base: give it an adapter, or leave it out of the rules")
    moved = [path for path, choice in adapt.plan.items() if not isinstance(choice, Full) and choice.rewrites_weight]
    if moved:
        raise ValueError(f"{moved[0]!r} (and {len(moved) - 1} other paths) starts from another weight than the base, "
                         f"so the reference is not in the frozen base: set fold=False")
    return jax.tree.unflatten(adapt.sites.tree, [frozen.base[path] for path in adapt.sites.leaves])


def sequence_log_probs(logits: jax.Array, labels: jax.Array, completion: jax.Array) -> jax.Array:
    """Sum of log p(label) over the last axis: logits (..., L, V), labels (..., L) int, completion (..., L), 0 for
    tokens that do not count -> (...) float32. The softmax is in float32. Without all logits at once:
    `lorajax.models.frozen_head.frozen_head_log_probs`, times `completion`, summed."""
    logits = logits.astype(jnp.float32)
    # A sum over comparisons, not an index, whose gradient XLA would scatter into an array as large as the logits.
    right = jnp.sum(jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), logits, 0.0), axis=-1)
    return jnp.sum((right - jax.nn.logsumexp(logits, axis=-1)) * completion, axis=-1)


def preference_losses(
    policy: jax.Array, reference: jax.Array, *, beta: float = 0.1, label_smoothing: float = 0.0, kind: Kind = "dpo"
) -> jax.Array:
    """(B,) losses from log-probabilities (B, 2) of chosen and rejected; h = (log-ratio chosen) - (log-ratio rejected).

    dpo: -log sigmoid(beta h), Rafailov et al. 2023, eq. 7; with `label_smoothing` e, the probability that a pair is the
    wrong way round, -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (conservative DPO: Mitchell, 2023).
    ipo: (h - 1 / (2 beta))^2, Azar et al. 2023 (arXiv 2310.12036), eq. 17, beta being its tau. TRL divides each
    log-probability by its completion's tokens there; for that, hand in such means.
    """
    if kind not in ("dpo", "ipo"):
        raise ValueError(f"{kind=} is neither 'dpo' nor 'ipo'")
    if not beta > 0:
        raise ValueError(f"{beta=} must be positive; the paper's is 0.1")
    if not 0.0 <= label_smoothing < 0.5 or (label_smoothing and kind == "ipo"):
        raise ValueError(f"{label_smoothing=} with {kind=}: it is the probability, below 0.5, that a pair is the wrong "
                         f"way round, and 'dpo' alone has it")
    ratios = policy - reference
    margin = ratios[:, 0] - ratios[:, 1]
    if kind == "ipo":
        return jnp.square(margin - 1.0 / (2.0 * beta))
    right, wrong = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
    return -(1.0 - label_smoothing) * right - label_smoothing * wrong


def make_dpo_loss(
    log_probs: LogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0, kind: Kind = "dpo"
) -> Loss:
    """A loss for `make_step` with `WithReference`. batch: what `log_probs` reads, and `weight` (B,), 0 for rows that do
    not count.

    Reports TRL's means over the batch: `rewards/chosen`, `rewards/rejected` (beta times the log-ratio of policy and
    reference), `rewards/margins`, `rewards/accuracies` (share of pairs whose chosen reward is the larger),
    `logps/chosen` and `logps/rejected`. The reference is computed without dropout and gets no gradient.
    """

    def loss(params: Policy, batch: Any, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        weight = batch["weight"].astype(jnp.float32)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1.0)

        fixed = jax.lax.stop_gradient(log_probs(params.reference, batch, None))
        policy = log_probs(params.policy, batch, key)
        each = preference_losses(policy, fixed, beta=beta, label_smoothing=label_smoothing, kind=kind)
        rewards = beta * (policy - fixed)
        told = {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1],
                "rewards/margins": rewards[:, 0] - rewards[:, 1],
                "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32),
                "logps/chosen": policy[:, 0], "logps/rejected": policy[:, 1]}  # fmt: skip
        return mean(each), {name: jax.lax.stop_gradient(mean(x)) for name, x in told.items()}

    return loss
