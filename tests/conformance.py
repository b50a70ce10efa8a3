"""The conformance table: one row per public variant (more where an option changes the structure). Plain data.

`test_conformance.py` runs every cross-cutting test over it and fails when one of `lorajax.variants.NAMES` has no row.
"""

from typing import Any, NamedTuple

from lorajax.core.variant import Variant
from lorajax.variants import AdaLoRA, DoRA, LoRA


class Row(NamedTuple):
    """What is promised of one variant.

    name: in `NAMES`. paper: arXiv id, in the class's docstring. variant: small, for a (12, 8) weight.
    shapes: of the adapter's arrays for a (12, 8) weight. identity: the start leaves the function as it is.
    penalised: it has a loss term of its own. merges: `merge` gives plain weights. lr: Adam's, for eight examples.
    in_model: run the tests in a model too; False where an option of a listed variant changes only its start or scale.
    """

    name: str
    paper: str
    variant: Variant
    shapes: dict[str, tuple[int, ...]]
    identity: bool = True
    penalised: bool = False
    merges: bool = True
    lr: float = 0.03
    in_model: bool = True


LORA = {"A": (12, 4), "B": (4, 8)}
ADALORA = {"A": (12, 4), "E": (4,), "B": (4, 8)}
NORMS = {"magnitude": (8,), "weight_norm": (8,)}

ROWS: dict[str, Row] = {
    "lora": Row("lora", "2106.09685", LoRA(rank=4), LORA),
    "lora-rslora": Row("lora", "2312.03732", LoRA(rank=4, rslora=True, initializer="gaussian"), LORA, in_model=False),
    "lora-orthogonal": Row("lora", "2106.09685", LoRA(rank=4, initializer="orthogonal"), LORA, in_model=False),
    "lora-embedding": Row("lora", "2106.09685", LoRA(rank=4, initializer="embedding"), LORA, in_model=False),
    "lora-fa": Row("lora", "2308.03303", LoRA(rank=4, freeze_a=True), LORA),
    "adalora": Row("adalora", "2303.10512", AdaLoRA(rank=4), ADALORA, penalised=True),
    "dora": Row("dora", "2402.09353", DoRA(LoRA(rank=4)), LORA | NORMS),
    "dora-full-gradient": Row("dora", "2402.09353", DoRA(LoRA(rank=4), detach=False), LORA | NORMS, in_model=False),
    "dora-adalora": Row("dora", "2402.09353", DoRA(AdaLoRA(rank=4)), ADALORA | NORMS, penalised=True),
}


def perturbed(adapter: Any, draw: Any) -> Any:
    """`adapter` with every array replaced by noise: nothing is left at a start that hides half of the maths."""
    noisy = type(adapter)(*(None if x is None else 0.3 * draw(x.shape) for x in adapter))
    if getattr(noisy, "weight_norm", None) is not None:  # DoRA: of columns that are shorter than 2 in these tests
        noisy = noisy._replace(weight_norm=2 + abs(noisy.weight_norm))
    return noisy
