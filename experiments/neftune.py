# NEFTune (Jain et al., arXiv 2310.05914): uniform noise on the input embeddings, in training. For any Linen model that
# has its tokens' table in a module of this name; the model knows nothing of it.

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def noisy(apply: Callable[..., Any], alpha: float, module: str = "word") -> Callable[..., Any]:
    # `apply(variables, input_ids, attention_mask, ..., rngs={"dropout": key})` with each real token's embedding moved
    # by U(-1, 1) alpha / sqrt(L D): L is the number of real tokens of its row (many ports take the padded length), D
    # the width. alpha 0 is `apply` itself; the paper uses 5, 10 and 15.
    if not alpha:
        return apply

    def run(variables: Any, input_ids: jax.Array, attention_mask: jax.Array, *args: Any, rngs: Any, **more: Any) -> Any:
        key = jax.random.fold_in(rngs["dropout"], 2310)
        moved = []

        def add(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out = call(*args, **kwargs)
            if context.module.name != module or context.method_name != "__call__":
                return out
            moved.append(context.module.path)
            real = (attention_mask != 0).astype(jnp.float32)
            size = alpha / jnp.sqrt(jnp.maximum(real.sum(1), 1.0) * out.shape[-1])
            noise = jax.random.uniform(key, out.shape, minval=-1.0, maxval=1.0)
            return out + (noise * (size[:, None] * real)[:, :, None]).astype(out.dtype)

        with nn.intercept_methods(add):
            result = apply(variables, input_ids, attention_mask, *args, rngs=rngs, **more)
        if len(moved) != 1:
            raise ValueError(f"neftune={alpha} needs one table of tokens; this model makes {len(moved)} calls of "
                             f"modules named {module!r}: name the right one, or set neftune=0")
        return result

    return run
