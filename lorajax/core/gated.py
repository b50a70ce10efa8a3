"""Where silu(x W1) * (x W2) is in a program, and whether one kernel may add the updates of both products as it reads
them (`lorajax.core.gated_kernel`)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat

KERNELS = ("", "triton", "interpret")
"""`lift`'s choices: none; on an NVIDIA GPU; by Pallas's interpreter, which is slow and runs anywhere, for tests."""
ROWS, COLUMNS = 32, 64
"""The kernel's tile."""
WIDEST = 64
"""Most rank components of one update: with 128 the backward kernel would take 149 KiB of shared memory, with 64 it
takes 89, and smaller GPUs have 99."""


class Waiting(NamedTuple):
    """A product with an adapted weight that is not added up yet, (y + h b) g: y (..., out), h (..., r), b (r, out) of
    one dtype, g (out,) or None."""

    y: jax.Array
    h: jax.Array
    b: jax.Array
    g: jax.Array | None


class Gates:
    """The gates of one jaxpr: silu(x W1) * (x W2), where nothing else reads the two products."""

    def __init__(self, jaxpr: Any, kernels: str):
        self.products: set[int] = set()
        """The equations of products that may wait."""
        self.sides: dict[int, tuple[int, Any]] = {}
        """Of a gate's last equation: which operand is the silu, and the only product that reads the result or None."""
        self.silus: set[int] = set()
        if not kernels:
            return
        made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        readers: dict[Any, list[Any]] = {}
        for eqn in jaxpr.eqns:
            for atom in eqn.invars:
                if not isinstance(atom, compat.Literal):
                    readers.setdefault(atom, []).append(eqn)

        def alone(atom: Any) -> bool:
            return len(readers.get(atom, ())) == 1 and atom not in jaxpr.outvars

        def maker(atom: Any) -> Any:
            return made.get(atom) if not isinstance(atom, compat.Literal) and alone(atom) else None

        for eqn in jaxpr.eqns:
            for side in (0, 1) if eqn.primitive.name == "mul" else ():
                silu, up = maker(eqn.invars[side]), maker(eqn.invars[1 - side])
                gate = maker(silu.invars[0]) if silu is not None and is_silu(silu) else None
                if gate is None or up is None or {gate.primitive.name, up.primitive.name} != {"dot_general"}:
                    continue
                if fits(gate.outvars[0].aval, up.outvars[0].aval, kernels):
                    self.products |= {id(gate), id(up)}
                    self.silus.add(id(silu))
                    (z,) = eqn.outvars
                    self.sides[id(eqn)] = (side, readers[z][0] if alone(z) and multiplies(readers[z][0], z) else None)
                    break


def multiplies(eqn: Any, x: Any) -> bool:
    """Whether an equation is x (..., out) times something along x's last dimension."""
    if eqn.primitive.name != "dot_general" or eqn.invars[0] is not x:
        return False
    (contracted, _), batch = eqn.params["dimension_numbers"]
    return tuple(contracted) == (x.aval.ndim - 1,) and not any(batch)


def is_silu(eqn: Any) -> bool:
    """Whether a jitted function is x logistic(x), as `jax.nn.silu` is."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return False
    inner = compat.open_jaxpr(eqn.params["jaxpr"])
    if len(inner.invars) != 1 or [e.primitive.name for e in inner.eqns] != ["logistic", "mul"]:
        return False
    (x,), (logistic, mul) = inner.invars, inner.eqns
    (s,) = logistic.outvars
    return logistic.invars[0] is x and [*mul.invars] in ([x, s], [s, x]) and [*inner.outvars] == [*mul.outvars]


def fits(gate: Any, up: Any, kernels: str) -> bool:
    """Whether the kernels take products of these types: 16 bits (the interpreter 32 too), ROWS a divisor of the rows
    and COLUMNS of the outputs."""
    if gate.ndim < 2 or (gate.shape, gate.dtype) != (up.shape, up.dtype):
        return False
    whole = math.prod(gate.shape[:-1]) % ROWS == 0 and gate.shape[-1] % COLUMNS == 0
    if kernels == "interpret":
        return whole and gate.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    return whole and gate.dtype in (jnp.bfloat16, jnp.float16) and compat.triton_gpu()
