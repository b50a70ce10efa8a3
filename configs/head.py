r"""The head alone on the frozen encoder, the other yardstick, on a GLUE task or on `reviews`.

    python -m experiments.glue --config configs/head.py
    python -m experiments.glue --config configs/head.py:smoke

No weight of the encoder is adapted. The learning rate is that of the head, `lr`.

Measured: not yet.
"""

from ml_collections import ConfigDict

from configs.base import arguments, glue


def get_config(arg: str | None = None) -> ConfigDict:
    args = arguments(arg, rank=None)
    c = glue(args)
    c.head_lr = 0.0
    c.variant = {"name": "none"}
    return c
