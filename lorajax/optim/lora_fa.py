"""LoRA-FA: A stays at its random start and only B learns (Zhang et al., arXiv 2308.03303)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def lora_fa(optimizer: optax.GradientTransformation, labels: dict[str, Any], frozen: tuple[str, ...] = ("a",),
            ) -> optax.GradientTransformation:
    """`optimizer` for every leaf but those labelled `frozen`, which get a zero update and no optimizer state.

    The paper's first form: B by any optimizer. Use it with ``LoRA(freeze_a=True)``: then A has no gradient that global
    clipping would count, and the backward pass keeps x A (rank numbers per token) in place of x.
    """
    kind = jax.tree.map(lambda label: "frozen" if label in frozen else "trained", labels)
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, kind)


def lora_fa_projected(learning_rate: optax.ScalarOrSchedule, labels: dict[str, Any], scales: Mapping[str, Any], *,
                      b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 0.0,
                      damping: float = 1e-8) -> optax.GradientTransformation:
    """PEFT's LoraFAOptimizer: AdamW on the gradient of B that best explains the full gradient (see `project_b`).

    Its learning rate is not that of `lora_fa`. Three differences from PEFT: the product is float32 (PEFT runs it under
    bfloat16 autocast), weight decay acts on B before the step, as in AdamW, where PEFT's acts after it, and eps is
    added after the bias correction, as in Adam's paper, where PEFT's comes before it.
    """
    tail = lora_fa(optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay), labels)
    return optax.chain(project_b(scales, damping), tail)


def project_b(scales: Mapping[str, Any], damping: float = 1e-8) -> optax.GradientTransformation:
    """Stateless: ``g_B <- (A^T A + damping I)^-1 g_B / s^2`` at every path in `scales`, float32, stacks included.

    scales: site path -> s, ``{path: v.scale for path, v in adapt.plan.items() if isinstance(v, LoRA)}``.
    It is least squares: the update of s A B is then the full gradient projected on A's columns (LoRA-Pro, A fixed).
    """

    def update(updates: dict[str, Any], state: Any, params: dict[str, Any] | None = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("project_b needs the parameters: call tx.update(grads, state, params)")
        if missing := sorted(set(scales) - set(updates)):
            raise ValueError(f"scales names {missing}, which are not trained; the trained paths are {sorted(updates)}")
        projected = {path: updates[path]._replace(B=_project(params[path].A, updates[path].B, scale, damping))
                     for path, scale in scales.items()}
        return {**updates, **projected}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _project(a: jax.Array, g: jax.Array, scale: Any, damping: float) -> jax.Array:
    a32 = a.astype(jnp.float32)
    gram = jnp.einsum("...ir,...is->...rs", a32, a32, precision="highest")
    damped = gram + jnp.broadcast_to(damping * jnp.eye(gram.shape[-1]), gram.shape)
    return (jnp.linalg.solve(damped, g.astype(jnp.float32)) / scale**2).astype(g.dtype)
