r"""OFT (arXiv 2306.07280) on a GLUE task or on `reviews`.

    python -m experiments.glue --config configs/oft.py
    python -m experiments.glue --config configs/oft.py:smoke
    python -m experiments.glue --config configs/oft.py:task=rte,block_size=16

Inputs rotated in blocks, by the series of OFTv2 (arXiv 2506.19847). The block size is PEFT's; the papers tune the
learning rate on other tasks than these, so it is LoRA's. No decay: it would draw the rotations back.

Measured: not yet.
"""

from ml_collections import ConfigDict

from configs.base import arguments, glue


def get_config(arg: str | None = None) -> ConfigDict:
    args = arguments(arg, rank=None, block_size=32)
    c = glue(args, weight_decay=0.0)
    c.variant = {"name": "oft", "block_size": args.block_size, "share": False, "terms": 5, "eps": 0.0}
    return c
