r"""What adapting attention only, the MLP only and all linear layers costs and gives: 5 choices x 4 rates x 5 seeds.

    python -m experiments.sweep --config configs/studies/targets.py:task=mrpc
    python -m experiments.sweep --config configs/studies/targets.py:smoke

At rank 8, and with the ranks that give attention (18) and the MLP (14) the parameters of all linear layers at rank 8:
331,776, 322,560 and 331,776 with MiniLM. The figure is `parameters.png`.

Measured (NVIDIA H200, JAX 0.11.2, 2026-11-22): README.
"""

from ml_collections import ConfigDict

from lorajax import config
from lorajax.sweep import each, fixed, product, zipit


def get_config(arg: str | None = None) -> ConfigDict:
    args = config.arguments(arg, task="reviews", model="minilm", smoke=False)
    rates, seeds = [3.2e-4, 1e-3, 3.2e-3, 1e-2], range(5)
    if args.smoke:
        rates, seeds = [1e-3], range(1)
    where = fixed(**{"study": "targets", "config": "lora", "arg.task": args.task, "arg.model": args.model,
                     "arg.recipe": "fair", "arg.smoke": args.smoke})  # fmt: skip
    choices = zipit(each("arg.targets", ["all-linear", "attention", "ffn", "attention", "ffn"]),
                    each("arg.rank", [8, 8, 8, 18, 14]))
    c = ConfigDict({"args": args})
    c.trials = product(where, choices, each("lr", rates), each("seed", seeds))
    return c
