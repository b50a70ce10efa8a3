r"""DyLoRA in both its forms, scored at each of its ranks, against a LoRA trained at each rank: 10 x 3 rates x 5 seeds.

    python -m experiments.sweep --config configs/studies/dylora_ranks.py:task=sst2
    python -m experiments.sweep --config configs/studies/dylora_ranks.py:smoke

The figure is `ranks.png`. DyLoRA's one run promises what R runs of LoRA give (arXiv 2210.07558).

Measured (NVIDIA H200, JAX 0.11.2, 2026-11-22 to 2026-11-23): README.
"""

from ml_collections import ConfigDict

from lorajax import config
from lorajax.sweep import chain, each, fixed, product


def get_config(arg: str | None = None) -> ConfigDict:
    args = config.arguments(arg, task="reviews", model="minilm", smoke=False)
    ranks, rates, seeds = range(1, 9), [3.2e-4, 1e-3, 3.2e-3], range(5)
    if args.smoke:
        ranks, rates, seeds = range(1, 3), [1e-3], range(2)
    where = fixed(**{"study": "dylora_ranks", "arg.task": args.task, "arg.model": args.model, "arg.recipe": "fair",
                     "arg.smoke": args.smoke})  # fmt: skip
    separate = product(fixed(config="lora"), each("arg.rank", ranks))
    one = fixed(**{"config": "dylora", "arg.rank": max(ranks)})
    # Only the highest of a step's ranks learns, or all up to it.
    one = chain(one, product(one, fixed(**{"controller.frozen": False})))
    c = ConfigDict({"args": args})
    c.trials = product(where, chain(separate, one), each("lr", rates), each("seed", seeds))
    return c
