"""Where a run's adapters begin: ranks shared out by importance, arrays drawn or read from data, or read back.

`loss` is that of `lorajax.train.step.make_step`, `batches` the training data (`batch(epoch, i)`, `epoch()`, a length),
`model` anything with `variables` and the base's `fingerprint`. What is read back is a folder of `lorajax.io.adapter`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lorajax import control
from lorajax.calibrate import calibrate
from lorajax.core.adapt import Adapt
from lorajax.core.adapt import adapt as make_adapt
from lorajax.io import adapter
from lorajax.shard.placement import LOCAL, Placement
from lorajax.variants.eva import redistribute


def by_importance(config: ConfigDict, adapt: Adapt, model: Any, loss: Any, batches: Any, key: jax.Array) -> Adapt:
    """`adapt` with a rank per site, in proportion to its score at the start, from the gradients of the first batches
    (`config.ranks`)."""
    c = config.ranks
    trainable, frozen = jax.jit(adapt.init)(key, model.variables)

    def gradient(trainable: Any, batch: Any, frozen: Any) -> Any:
        return jax.grad(lambda tr: loss(adapt.bind(tr, frozen), batch, key)[0])(trainable)

    first = [batches.batch(0, i) for i in range(min(c.batches, len(batches)))]
    scores = control.importance(adapt, gradient, trainable, first, c.metric, rest=(frozen,))
    matrices = sum(adapt.sites[path].extent(adapt.sites[path].stack_axes) for path in scores)
    ranks = control.allocate(adapt, scores, ranks=round(c.budget * matrices), minimum=c.minimum)
    return make_adapt(adapt.sites, control.with_ranks(adapt, ranks, keep=c.keep), adapt.dtype)


def make(config: ConfigDict, adapt: Adapt, model: Any, loss: Any, batches: Any, key: jax.Array,
         mask: Callable[[Any], jax.Array] | None, place: Placement = LOCAL,
         made: Mapping[str, Any] | None = None) -> tuple[Adapt, dict[str, Any], Any]:
    """(adapt, trainable, frozen) at step 0, where `place` has them. A start that reads data gets the first
    `config.calibrate.batches`; `loss` is then without dropout, and `mask` says which tokens count. Ranks may have moved
    (EVA). made: what a start got when the base was quantised (`build.quantized`)."""
    c, stats = config.calibrate, dict(made or {})
    if _statistics(adapt).keys() - stats.keys():
        few = list(itertools.islice(batches.epoch(), c.batches))
        stats |= calibrate(adapt, lambda params, batch: loss(params, batch, key)[0], model.variables, few, mask=mask,
                           at_once=c.at_once or None)
        if c.redistribute:
            adapt, stats = redistribute(adapt, stats)
    trainable, frozen = jax.jit(adapt.init, out_shardings=place.adapters(adapt))(key, model.variables, stats)
    if any(getattr(choice, "rewrites_weight", False) for choice in adapt.plan.values()):
        # The program that `read` runs, so that a resumed run has the same bits.
        return adapt, *place.adopt(adapt, (trainable, adapt.frozen(model.variables, adapt.kept(frozen))))
    return adapt, trainable, frozen


def read(config: ConfigDict, adapt: Adapt, model: Any, folder: Path,
         place: Placement = LOCAL) -> tuple[Adapt, dict[str, Any], Any]:
    """The same, as it was saved: a resumed run neither reads the data again nor repeats a decomposition, which another
    machine may round differently. Ranks that importance or EVA moved are in the saved plan."""
    if reads_data(config, adapt):
        plan = adapter.plan(folder)
        chosen = {path: c._replace(choice=plan[path]) for path, c in adapt.chosen.items() if path in plan}
        adapt = dataclasses.replace(adapt, chosen=chosen)
    return adapt, *place.adopt(adapt, adapter.load(folder, adapt, model.variables, base=model.fingerprint))


def reads_data(config: ConfigDict, adapt: Adapt) -> bool:
    """Whether ranks or arrays depend on data at the start."""
    return bool(config.ranks.budget or _statistics(adapt))


def _statistics(adapt: Adapt) -> dict[str, Any]:
    """Path -> what its start reads."""
    return {path: found for path, v in adapt.plan.items() if (found := getattr(v, "statistic", None))}
