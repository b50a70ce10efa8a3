"""The table that `print(adapt)` shows: which rule took which weight, ranks, parameters, and training memory."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lorajax.core.bound import is_bound
from lorajax.core.lift import lift
from lorajax.core.liveness import fullest, total
from lorajax.core.packed import is_packed
from lorajax.core.sites import table
from lorajax.core.variant import Full, Variant


def parameters(tree: Any) -> int:
    """Number of elements in a tree of arrays or shapes."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def trained(adapt: Any, trainable: Any) -> dict[str, int]:
    """Path, or name of a shared slot -> number of its parameters that an optimizer moves."""
    still = {path: choice.inner.still for path, choice in adapt.plan.items() if isinstance(choice, Variant)}
    return {name: parameters(tree) - parameters([getattr(tree, leaf) for leaf in still.get(name, ())])
            for name, tree in trainable.items()}


def activations(adapt: Any) -> int:
    """Bytes that a step for the traced arguments needs at its fullest beside its arguments, its results and their
    gradients: what the backward pass keeps from the forward pass and what either works on, as `fullest` has it."""
    call, inputs = adapt.sites.trace
    trainable, frozen = adapt.shapes

    def run(trainable: Any, frozen: Any, inputs: Any) -> list[jax.Array]:
        weights = jax.tree.leaves(adapt.bind(trainable, frozen), is_leaf=lambda x: is_bound(x) or is_packed(x))
        results = jax.tree.leaves(lift(call)(weights, inputs))
        return [x for x in results if jax.dtypes.issubdtype(x.dtype, np.inexact)]

    def step(trainable: Any, frozen: Any, inputs: Any, by: Any) -> Any:
        return jax.vjp(lambda trainable: run(trainable, frozen, inputs), trainable)[1](by)

    by = jax.eval_shape(run, trainable, frozen, inputs)
    return total(fullest(jax.make_jaxpr(step)(trainable, frozen, inputs, by)))


def memory(adapt: Any) -> dict[str, int]:
    """Bytes of a training step with Adam for the traced arguments, by what they hold."""
    trainable, frozen = adapt.shapes
    own = total(trainable)
    return {"frozen": total(frozen), "trainable": own, "gradients": own, "moments": 2 * own,
            "activations": activations(adapt)}


def summary(adapt: Any) -> str:
    """The table of an `Adapt`, as text."""
    trainable, _ = adapt.shapes
    total = parameters(list(adapt.sites.leaves.values()))
    counts = trained(adapt, trainable)
    rows: list[tuple[str, ...]] = [("path", "shape", "gets", "rank", "params", "% of base", "rule")]
    for path, chosen in adapt.chosen.items():
        own = counts[path]
        name = "Full" if isinstance(chosen.choice, Full) else type(chosen.choice).__name__
        shape = ",".join(map(str, adapt.sites.leaves[path].shape))
        rows.append((path, shape, name, str(getattr(chosen.choice, "rank", "")), f"{own:,}", f"{100 * own / total:.3f}",
                     f"{chosen.rule} {chosen.pattern}"))
    for name, slot in adapt.slots.items():
        own = counts.get(name, 0)
        rows.append((name, "", type(slot.variant).__name__, str(getattr(slot.variant, "rank", "")), f"{own:,}",
                     f"{100 * own / total:.3f}", f"read by {len(slot.paths)} weights"))
    own = sum(counts.values())
    parts = {name: f"{value / 2**20:.1f} MiB" for name, value in memory(adapt).items()}
    return "\n".join([
        table(rows), f"trains {own:,} of {total:,} parameters ({100 * own / total:.3f} %)",
        "training memory with Adam, for the traced batch: " + ", ".join(f"{n} {v}" for n, v in parts.items())])
