# What a language model learns: the likelihood of completions, or DPO's preference for one of two (lorajax.train.dpo).

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorajax as lj
from experiments.neftune import noisy
from lorajax import data, language
from lorajax.build import kernels
from lorajax.core.bound import is_bound
from lorajax.core.packed import unpacked
from lorajax.models.frozen_head import frozen_head_log_probs, frozen_head_loss
from lorajax.shard.placement import LOCAL, Placement
from lorajax.train.dpo import make_dpo_loss


def make_losses(
    c: Any, model: language.Model, adapt: lj.Adapt, training: bool, smoothing: float = 0.0
) -> Callable[..., jax.Array]:
    # (params, bound or plain; batch of rows; key of dropout or None; weight) -> the weighted mean of the tokens' losses
    # over the batch or, `by_row`, their sum in each row. A head that does not train makes its logits in chunks.
    # Causal attention keeps from a token what is right of it, so only packed rows need their segments.
    net: Any = model.net
    loud = net.clone(deterministic=False) if training and hasattr(net.config, "hidden_dropout") else net

    def passes(net: Any, noise: float) -> tuple[Any, Any]:
        hidden = noisy(partial(net.apply, method="hidden"), noise, module="embed")
        lift = partial(lj.lift, once=c.quant.once, kernels=kernels(c))
        return lift(hidden), lift(noisy(net.apply, noise, module="embed"))

    noise = c.neftune if training else 0.0
    drawn, fixed = passes(loud, noise), passes(net, 0.0)
    untrained = model.head not in adapt.plan

    def losses(params: Any, batch: Any, key: Any, weight: jax.Array, by_row: bool = False) -> jax.Array:
        labels = batch["labels"]
        more = {"positions": batch["positions"], "segments": batch["segments"]} if c.packing else {}
        # Without a key, as DPO's reference has none, nothing is dropped and no noise is added.
        hidden, logits = fixed if key is None else drawn
        args = (params, batch["input_ids"], batch["segments"] > 0 if noise and key is not None else None)
        rngs = {} if key is None else {"dropout": key}
        kernel = head(params, model)
        if untrained and not is_bound(kernel):
            x = hidden(*args, **more, rngs=rngs)
            if by_row:
                return -jnp.sum(frozen_head_log_probs(x, kernel, labels) * weight, axis=-1)
            return frozen_head_loss(x, kernel, labels, weight, smoothing=smoothing)
        scores = logits(*args, **more, rngs=rngs)
        # A sum over comparisons, not an index, whose gradient XLA would scatter into an array as large as the logits.
        right = jnp.sum(jnp.where(jax.nn.one_hot(labels, scores.shape[-1], dtype=bool), scores, 0.0), axis=-1)
        right = (1.0 - smoothing) * right + smoothing * jnp.mean(scores, axis=-1)
        each = (jax.nn.logsumexp(scores, axis=-1) - right) * weight
        return jnp.sum(each, axis=-1) if by_row else jnp.sum(each) / jnp.maximum(jnp.sum(weight), 1.0)

    return losses


def head(params: Any, model: language.Model) -> Any:
    # The matrix (D, V) that makes the logits; a tied table is (V, D).
    node = params
    for name in model.head.split("/"):
        node = node[name]
    node = unpacked(node)
    return node.T if model.net.config.tie_embeddings and not is_bound(node) else node


def make_sft(c: Any, model: language.Model, adapt: lj.Adapt, training: bool = True) -> Any:
    losses = make_losses(c, model, adapt, training, c.label_smoothing if training else 0.0)
    return lambda params, batch, key: (losses(params, batch, key, batch["weight"]), {})


def make_dpo(c: Any, model: language.Model, adapt: lj.Adapt, training: bool = True) -> Any:
    losses = make_losses(c, model, adapt, training)

    def log_probs(params: Any, batch: Any, key: Any) -> jax.Array:
        rows = {name: batch[name].reshape(-1, batch[name].shape[-1])
                for name in ("input_ids", "positions", "segments", "labels", "completion")}  # fmt: skip
        return -losses(params, rows, key, rows["completion"], by_row=True).reshape(-1, 2)

    return make_dpo_loss(log_probs, beta=c.dpo.beta, kind=c.dpo.kind, label_smoothing=c.dpo.label_smoothing)


def ranked(told: Any, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Of what a DPO loss returns: loss, share of pairs in the right order, number of pairs.
    loss, means = told
    return loss, means["rewards/accuracies"], jnp.sum(weight)


def tokens(batch: data.Batch) -> jax.Array:
    # 1 for tokens, 0 for padding and in empty rows.
    real = (jnp.sum(batch["weight"], axis=1) > 0)[:, None]
    return jnp.where(real & (jnp.asarray(batch["segments"]) > 0), 1.0, 0.0)


def likelihood(judge: Any, batches: data.Batches, place: Placement = LOCAL) -> dict[str, float]:
    # Of a token to be predicted, given those before it. judge: batch -> (mean loss, number of tokens).
    found = np.asarray(jax.device_get([judge(place.batch(batch)) for batch in batches.epoch()]), np.float64)
    loss = float(np.sum(found[:, 0] * found[:, 1]) / np.sum(found[:, 1]))
    return {"log_likelihood": -loss, "perplexity": float(np.exp(loss))}


def preference(judge: Any, batches: data.Batches, place: Placement = LOCAL) -> dict[str, float]:
    # judge: batch of pairs -> (mean DPO loss, share of pairs in the right order, number of pairs).
    found = np.asarray(jax.device_get([judge(place.batch(batch)) for batch in batches.epoch()]), np.float64)
    loss, right = (float(np.sum(found[:, i] * found[:, 2]) / np.sum(found[:, 2])) for i in (0, 1))
    return {"preference": -loss, "preference_accuracy": right}
