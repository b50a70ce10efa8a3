r"""AdaLoRA against LoRA at the same final budget, and where AdaLoRA keeps its ranks: 2 x 3 budgets x 3 rates x 5 seeds.

    python -m experiments.sweep --config configs/studies/adalora_budget.py:task=mrpc
    python -m experiments.sweep --config configs/studies/adalora_budget.py:task=mrpc,watch
    python -m experiments.sweep --config configs/studies/adalora_budget.py:smoke

The budget is the average rank of a matrix at the end; AdaLoRA begins with 1.5 times as much (arXiv 2303.10512). The
figure is `ranks.png`. watch: one run for each budget, which logs the ranks of every matrix 24 times on its way; the
figures are the heat maps `budget-*.png`.

Measured (NVIDIA H200, JAX 0.11.2, 2026-11-22 to 2026-11-23): README.
"""

from ml_collections import ConfigDict

from lorajax import config
from lorajax.sweep import each, fixed, product


def get_config(arg: str | None = None) -> ConfigDict:
    args = config.arguments(arg, task="reviews", model="minilm", watch=False, smoke=False)
    methods, budgets, rates, seeds = ["lora", "adalora"], [2, 4, 8], [3.2e-4, 1e-3, 3.2e-3], range(5)
    if args.watch:
        methods, rates, seeds = ["adalora"], [1e-3], range(1)
    if args.smoke:
        budgets, rates, seeds = [2], [1e-3], range(1)
    watched = {"study": "adalora_watch", "steps_per_call": 5, "eval_every": 5 if args.smoke else 25}
    where = fixed(**{"study": "adalora_budget", "arg.task": args.task, "arg.model": args.model, "arg.recipe": "fair",
                     "arg.smoke": args.smoke} | (watched if args.watch else {}))  # fmt: skip
    c = ConfigDict({"args": args})
    c.trials = product(where, each("config", methods), each("arg.rank", budgets), each("lr", rates),
                       each("seed", seeds))  # fmt: skip
    return c
