"""Trained adapters as experts of a mixture, routed per token without training (Ostapenko et al., arXiv 2405.11157)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorajax.compose.composed import planned
from lorajax.compose.gathered import Adapter, Trained, gather, weighted
from lorajax.compose.svd import decompose
from lorajax.compose.wholes import Whole, wholes
from lorajax.core.adapt import Adapt, Frozen
from lorajax.variants.lora import LoRAAdapter
from lorajax.variants.molora import MoLoRA, MoLoRAAdapter


def arrow(adapters: Sequence[Trained], *, router: str = "arrow", top_k: int = 3, temperature: float = 1.0,
          full: Whole = None, params: Any = None) -> Adapter:
    """``p(x) = softmax over the top k of |x v_e| / temperature`` (arXiv 2405.11157): v_e is the input
    direction that expert e's update stretches most, its first left singular vector (ours: W is (in, out)), found from
    its factors. The result is `MoLoRA`, whose arrays can be trained on; the paper trains nothing.

    router: another of MoLoRA's, to train from this start. top_k, temperature: PEFT's 3 and 1; top_k above the number of
    experts means all. Ranks are filled up with zeros. `merge` refuses the result: weights differ by token.
    Raises ValueError where adapters adapt different sites, and for convolutions and lookup tables.
    """
    found, n = gather(adapters, params), len(adapters)
    ones, made = weighted(None, n), {}
    plain: dict[str, LoRAAdapter] = {}
    for path in found.paths:
        site, rows = found.sites[path], []
        if any(use.op != "matmul" for use in site.uses):
            raise ValueError(f"{path} is used by a {site.op}, which has no tokens to route: leave it "
                             f"out of the adapters")
        for part in found.parts(ones, None, [path]):
            if len(part.members) < n:
                lack = sorted(set(range(n)) - set(part.members))
                raise ValueError(f"{path}: adapters {lack} do not adapt it, and every expert needs a direction here: "
                                 f"give adapters of the same sites")
            rank = max(pair.a.shape[1] for pair in part.pairs)
            a = np.stack([np.pad(p.a, ((0, 0), (0, rank - p.a.shape[1]))) for p in part.pairs])
            b = np.stack([np.pad(p.b, ((0, rank - p.b.shape[0]), (0, 0))) for p in part.pairs])
            g = np.stack([decompose(pair).u[:, 0] for pair in part.pairs], 1).astype(np.float32)
            rows.append((a, b, g))
        arrays = (jnp.asarray(np.stack(x)).reshape(*site.stack_shape, *x[0].shape) for x in zip(*rows, strict=True))
        made[path] = MoLoRAAdapter(*arrays)
        plain[path] = LoRAAdapter(made[path].A[..., 0, :, :], made[path].B[..., 0, :, :])
    trained, base = wholes(found, adapters, ones, full)
    chosen = dict(planned(found, plain, trained).chosen)
    for path, one in made.items():
        rank = one.A.shape[-1]
        choice = MoLoRA(rank=rank, experts=n, alpha=float(rank), router=router, top_k=0 if top_k >= n else top_k,
                        temperature=temperature)
        choice.check(found.sites[path].n_in, found.sites[path].n_out)
        chosen[path] = chosen[path]._replace(choice=choice)
    frozen = Frozen({path: base[path] for path in found.sites.leaves if path not in trained}, {}, {})
    return Adapter(Adapt(found.sites, chosen), {path: {**made, **trained}[path] for path in chosen}, frozen)
