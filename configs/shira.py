r"""SHiRA (arXiv 2406.13175) on a GLUE task or on `reviews`.

    python -m experiments.glue --config configs/shira.py
    python -m experiments.glue --config configs/shira.py:smoke
    python -m experiments.glue --config configs/shira.py:task=rte,model=minilm,rank=8 --config.lr=1e-3

Trains scattered entries of the weights, at random positions, as many as LoRA of this rank has parameters. PEFT's
benchmark learns at 3 times LoRA's rate, as here.

Measured: not yet.
"""

from ml_collections import ConfigDict

from configs.base import arguments, glue


def get_config(arg: str | None = None) -> ConfigDict:
    args = arguments(arg)
    c = glue(args, lr_times=3.0)
    c.variant = {"name": "shira", "rank": args.rank}
    return c
