"""Several adapters of one base composed into one.

    made = compose([one, two], TIES(), weights=[0.7, 0.5], rank=16)
    print(made)                                        # rank, error against the exact sum, interference
    model(made.adapt.bind(made.trainable, made.frozen), batch)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorajax.compose.gathered import Gathered, Pair, Part, Trained, gather, stacked, weighted
from lorajax.compose.interference import Interference, measured
from lorajax.compose.method import Method
from lorajax.compose.sums import Sum
from lorajax.compose.svd import decompose, decompose_dense, join, norm
from lorajax.compose.wholes import Whole, wholes
from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.rules import Chosen
from lorajax.core.sites import table
from lorajax.core.variant import Full, Variant
from lorajax.variants.lora import LoRA, LoRAAdapter

EXACTLY = Sum()
TINY = float(np.finfo(np.float32).tiny)


class Composed(NamedTuple):
    """adapt, trainable, frozen: LoRA of scale 1 at every site, on the original base.

    errors: path -> distance from the exact ``sum_t w_t dW_t``, relative to its norm. truncated: path -> what the rank
    cut off the method's own result, relative to its norm. interference: between the inputs. The last is None and the
    first empty without `measure`.
    """

    adapt: Adapt
    trainable: dict[str, Any]
    frozen: Frozen
    errors: dict[str, float]
    truncated: dict[str, float]
    interference: Interference | None

    def __str__(self) -> str:
        plan = {path: choice for path, choice in self.adapt.plan.items() if isinstance(choice, LoRA)}
        rows: list[tuple[str, ...]] = [("path", "rank", "error", "truncated")]
        rows += [(path, str(choice.rank), f"{self.errors.get(path, np.nan):.4f}", f"{self.truncated[path]:.4f}")
                 for path, choice in plan.items()]
        return table(rows) + (f"\n\n{self.interference}" if self.interference else "")


def compose(adapters: Sequence[Trained], method: Method = EXACTLY, *, weights: Any = None, rank: int | None = None,
            key: jax.Array | None = None, full: Whole = None, params: Any = None, measure: bool = True) -> Composed:
    """One adapter from several, of any variants, scales, ranks and targets; a site that some do not adapt is composed
    of those that do.

    weights: a number for each adapter, None for ones. rank: the largest to keep, by SVD; None: the method's own (a sum
    has all ranks together, at most min(in, out); a dense result what it needs). key: of methods that draw. full: what
    becomes of weights that adapters trained in full: an adapter's number to take its, 'sum' to add up their changes,
    'drop'; None refuses. params: the original base, needed where every adapter trained a weight in full.
    measure: whether to compute errors and interference.
    Raises ValueError for adapters that do not belong together, and for what a method has no meaning for.
    """
    found, w, survey = prepared(adapters, method, weights, key, params)
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is below 1: give at least rank=1, or None to lose nothing")
    made: dict[str, LoRAAdapter] = {}
    errors, truncated = {}, {}
    for path in found.paths:
        pairs, sizes = [], np.zeros(4)
        for part in found.parts(w, key, [path]):
            whole = method.compose(part, survey)
            pair, lost, size = fitted(whole, rank)
            pairs.append(pair)
            sizes += np.square([lost, size, *(off(pair, part) if measure else (0.0, 0.0))])
        made[path] = LoRAAdapter(*stacked(found.sites[path], pairs))
        lost, size, wrong, exact = np.sqrt(sizes)
        truncated[path] = lost / max(size, TINY)
        if measure:
            errors[path] = wrong / max(exact, TINY)
    trained, base = wholes(found, adapters, w, full)
    adapt = planned(found, made, trained)
    frozen = Frozen({path: base[path] for path in found.sites.leaves if path not in trained}, {}, {})
    return Composed(adapt, {path: {**made, **trained}[path] for path in adapt.plan}, frozen, errors, truncated,
                    measured(found) if measure else None)


def blended(adapters: Sequence[Trained], method: Method = EXACTLY, *, full: Whole = None, params: Any = None,
            ) -> tuple[Adapt, Callable[[jax.Array], dict[str, Any]], Frozen]:
    """(adapt, weights -> trainable, frozen): the composition as a function of its weights, which may be traced and
    differentiated. For methods that stay factored; what is trained in full must not depend on the weights.
    """
    if full == "sum":
        raise ValueError("full='sum' depends on the weights: name an adapter by its number, or drop what is trained")
    found, ones, survey = prepared(adapters, method, None, None, params)
    if survey is not None or not isinstance(method.compose(next(found.parts(ones)), None), Pair):
        raise ValueError(f"{type(method).__name__} forms dense updates: blend by Sum, LoraHub or another that stays "
                         f"factored, or compose(...) once for each set of weights")
    trained, base = wholes(found, adapters, ones, full)

    def of(weights: jax.Array) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for path in found.paths:
            pairs = [method.compose(part, None) for part in found.parts(weighted(weights, len(adapters)), None, [path])]
            made[path] = LoRAAdapter(*stacked(found.sites[path], pairs))  # type: ignore[arg-type]
        return {path: {**made, **trained}[path] for path in found.sites.leaves if path in made or path in trained}

    adapt = planned(found, {path: x for path, x in of(ones).items() if path not in trained}, trained)
    return adapt, of, Frozen({path: base[path] for path in found.sites.leaves if path not in trained}, {}, {})


def prepared(adapters: Sequence[Trained], method: Method, weights: Any, key: jax.Array | None,
             params: Any) -> tuple[Gathered, Any, Any]:
    """(what is gathered, the weights, what the method surveyed), after all checks."""
    if not isinstance(method, Method):
        raise ValueError(f"method={method!r} is no composition: give an instance such as Sum() or TIES()")
    found, n = gather(adapters, params), len(adapters)
    w = weighted(weights, n)
    method.check(n)
    corrected_once(adapters, w, method)
    if method.draws and key is None:
        raise ValueError(f"{type(method).__name__} draws at random: give key=jax.random.key(...)")
    return found, w, method.survey(lambda: found.parts(w, key), n)


def corrected_once(adapters: Sequence[Trained], weights: Any, method: Method) -> None:
    """Raises ValueError where starts from the quantisation (LoftQ, QPiSSA) would not go in once: each update of theirs
    holds, beside what was trained, the same part of the weight that quantisation took off."""
    total: dict[str, float] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for path, choice in one.adapt.plan.items():
            if isinstance(choice, Variant) and choice.statistic and choice.statistic.of == "quantization":
                total[path] = total.get(path, 0.0) + float(weight)
    wrong = [path for path, times in total.items() if abs(times - 1) > 1e-5 or not isinstance(method, Sum)]
    if wrong:
        raise ValueError(f"{wrong[0]}: these adapters started from the quantisation of their base, which every update "
                         f"corrects; with {type(method).__name__} and weights that sum to {total[wrong[0]]:g} the "
                         f"correction does not go in once: use Sum() with weights of such adapters that sum to 1")


def fitted(whole: Pair | np.ndarray, rank: int | None) -> tuple[Pair, float, float]:
    """(factors of at most `rank`, norm of what that cut off, norm of the whole)."""
    if isinstance(whole, Pair):
        limit = min(whole.a.shape[0], whole.b.shape[1])
        if whole.a.shape[1] <= min(limit, rank or limit):
            return whole, 0.0, 1.0
        found = decompose(whole)
    else:
        found = decompose_dense(whole)
    keep = min(found.needed, rank or found.needed)
    lost = found.lost(keep) if keep < found.needed else 0.0
    return found.pair(keep), lost, float(np.linalg.norm(found.s))


def off(pair: Pair, part: Part) -> tuple[float, float]:
    """(distance of a result from the exact sum, norm of that sum), without forming either."""
    exact = join(part.pairs, part.weights)
    return norm(join((pair, exact), (1.0, -1.0))), norm(exact)


def planned(found: Gathered, made: dict[str, Any], trained: dict[str, Any]) -> Adapt:
    """LoRA of scale 1 where there are factors, `Full` where a weight is trained, in tree order."""
    choices = {path: LoRA(rank=made[path].A.shape[-1], alpha=float(made[path].A.shape[-1])) if path in made else Full()
               for path in found.sites.leaves if path in made or path in trained}
    return Adapt(found.sites, {path: Chosen(choice, 0, re.escape(path)) for path, choice in choices.items()})
