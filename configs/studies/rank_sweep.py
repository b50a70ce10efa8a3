r"""Score against rank, LoRA at alpha / r and rank-stabilised: 2 scales x 7 ranks x 3 learning rates x 3 seeds.

    python -m experiments.sweep --config configs/studies/rank_sweep.py
    python -m experiments.sweep --config configs/studies/rank_sweep.py:task=mrpc
    python -m experiments.sweep --config configs/studies/rank_sweep.py:smoke

Rank-stabilised alpha is 16 / sqrt(8), so that both scales agree at rank 8. The figure is `ranks.png`.

Measured (NVIDIA H200, JAX 0.11.2, 2026-11-22 to 2026-11-23): README.
"""

from ml_collections import ConfigDict

from lorajax import config
from lorajax.sweep import each, fixed, product, zipit


def get_config(arg: str | None = None) -> ConfigDict:
    args = config.arguments(arg, task="reviews", model="minilm", smoke=False)
    ranks, rates, seeds = [1, 2, 4, 8, 16, 32, 64], [3e-4, 1e-3, 3e-3], range(3)
    if args.smoke:
        ranks, rates, seeds = [1, 2], [1e-3], range(2)
    scales = zipit(each("variant.rslora", [False, True]), each("variant.alpha", [16.0, 5.656854]))
    where = fixed(**{"study": "rank_sweep", "config": "lora", "arg.task": args.task, "arg.model": args.model,
                     "arg.recipe": "fair", "arg.smoke": args.smoke})  # fmt: skip
    c = ConfigDict({"args": args})
    c.trials = product(where, scales, each("arg.rank", ranks), each("lr", rates), each("seed", seeds))
    return c
