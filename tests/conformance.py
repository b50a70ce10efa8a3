"""The conformance table: one row per public variant (more where an option changes the structure). Plain data.

`test_conformance.py` runs every cross-cutting test over it and fails when one of `lorajax.variants.NAMES` has no row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core.variant import Seen, Variant
from lorajax.variants import (
    IA3,
    OFT,
    AdaLoRA,
    DeLoRA,
    DoRA,
    GraLoRA,
    HiRA,
    HydraLoRA,
    IncreLoRA,
    KaSA,
    LoHa,
    LoKr,
    LoRA,
    LoRAXS,
    MiCA,
    MiSS,
    MoLoRA,
    RandLoRA,
    ShareLoRA,
    SHiRA,
    SoRA,
    TrainableTokens,
    VBLoRA,
    VeRA,
)
from lorajax.variants.initializer import Pair


class Row(NamedTuple):
    """What is promised of one variant.

    name: in `NAMES`. paper: arXiv (or OpenReview) id, in the class's docstring. variant: small, for a (12, 8) weight.
    shapes: of the adapter's arrays for a (12, 8) weight. identity: the start leaves the function as it is.
    drawn: the start depends on the key.
    penalised: it has a loss term of its own. merges: `merge` gives plain weights. lr: Adam's, for eight examples.
    in_model: run the tests in a model too; False where an option of a listed variant changes only its start or scale.
    stats: for a start that reads data, what it read for a (12, 8) weight.
    """

    name: str
    paper: str
    variant: Variant
    shapes: dict[str, tuple[int, ...]]
    identity: bool = True
    drawn: bool = True
    penalised: bool = False
    merges: bool = True
    lr: float = 0.03
    in_model: bool = True
    stats: Any = None


LORA = {"A": (12, 4), "B": (4, 8)}
TAKEN_OFF = LORA | {"A0": (12, 4), "B0": (4, 8)}
INPUTS = jnp.float32(np.random.default_rng(4).normal(size=(30, 12)))
SEEN = Seen(INPUTS.T @ INPUTS, INPUTS.sum(0), jnp.float32(30), abs(INPUTS).max())
SLOPE = jnp.float32(np.random.default_rng(5).normal(size=(12, 8)))
MADE = Pair(0.1 * INPUTS[:12, :4], 0.1 * SLOPE[:4])
ADALORA = {"A": (12, 4), "E": (4,), "B": (4, 8)}
LOHA = {"A1": (12, 4), "B1": (4, 8), "A2": (12, 4), "B2": (4, 8)}
NORMS = {"magnitude": (8,), "weight_norm": (8,)}
RANDLORA = {"A": (8, 3), "B": (3, 3, 12), "lam": (3, 3), "gamma": (3, 8)}
VBLORA = {"bank": (6, 4), "logits_A": (4, 3, 6), "logits_B": (2, 4, 6)}
VERA = {"A": (12, 4), "B": (4, 8), "d": (4,), "b": (8,)}



def after(variant: Any, saw: Any) -> Any:
    """The statistic of a start that saw one batch."""
    return variant.statistic.update(variant.statistic.init(12, 8), saw)


ROWS: dict[str, Row] = {
    "lora": Row("lora", "2106.09685", LoRA(rank=4), LORA),
    "lora-rslora": Row("lora", "2312.03732", LoRA(rank=4, rslora=True, initializer="gaussian"), LORA, in_model=False),
    "lora-orthogonal": Row("lora", "2106.09685", LoRA(rank=4, initializer="orthogonal"), LORA, in_model=False),
    "lora-embedding": Row("lora", "2106.09685", LoRA(rank=4, initializer="embedding"), LORA, in_model=False),
    **{f"lora-{start}": Row("lora", paper, LoRA(rank=4, alpha=6.0, initializer=start), TAKEN_OFF, in_model=False,
                            drawn=False)
       for start, paper in (("milora", "2406.09044"), ("olora", "2406.01775"))},
    "lora-both": Row("lora", "2602.04998", LoRA(rank=4, initializer="both"), TAKEN_OFF, in_model=False),
    "lora-pissa": Row("lora", "2404.02948", LoRA(rank=4, alpha=6.0, initializer="pissa"), TAKEN_OFF, drawn=False),
    "lora-pissa-folded": Row("lora", "2404.02948", LoRA(rank=4, initializer="pissa", fold=True), TAKEN_OFF,
                             in_model=False, drawn=False),
    **{f"lora-{start}": Row("lora", paper, LoRA(rank=4, initializer=start), shapes, identity=start != "lora_one",
                            in_model=False, drawn=start == "lora_ga", stats=after(LoRA(rank=4, initializer=start), saw))
       for start, paper, shapes, saw in (
           ("eva", "2410.07170", LORA, SEEN), ("corda", "2406.05223", TAKEN_OFF, SEEN),
           ("lora_ga", "2407.05000", TAKEN_OFF, SLOPE), ("lora_one", "2502.01235", LORA, SLOPE))},
    **{f"lora-{start}": Row("lora", paper, LoRA(rank=4, initializer=start), LORA, identity=False, in_model=False,
                            drawn=False, stats=MADE)
       for start, paper in (("loftq", "2310.08659"), ("qpissa", "2404.02948"))},
    "mica": Row("mica", "2604.01694", MiCA(rank=4), LORA, drawn=False),
    "lora-fa": Row("lora", "2308.03303", LoRA(rank=4, freeze_a=True), LORA),
    "adalora": Row("adalora", "2303.10512", AdaLoRA(rank=4), ADALORA, penalised=True),
    "increlora": Row("increlora", "2308.12043", IncreLoRA(rank=4, initial=2, reserve=1), ADALORA | {"n": ()},
                     penalised=True),
    "sora": Row("sora", "2311.11696", SoRA(rank=4, l1=0.1), LORA | {"g": (4,)}, penalised=True),
    "dora": Row("dora", "2402.09353", DoRA(LoRA(rank=4)), LORA | NORMS),
    "dora-full-gradient": Row("dora", "2402.09353", DoRA(LoRA(rank=4), detach=False), LORA | NORMS, in_model=False),
    "dora-adalora": Row("dora", "2402.09353", DoRA(AdaLoRA(rank=4)), ADALORA | NORMS, penalised=True, in_model=False),
    "dora-loha": Row("dora", "2402.09353", DoRA(LoHa(rank=4)), LOHA | NORMS, in_model=False),
    "dora-magnitude": Row("dora", "2402.09353", DoRA(None), NORMS, drawn=False, lr=0.1, in_model=False),
    "loha": Row("loha", "2108.06098", LoHa(rank=4), LOHA),
    "loha-normal": Row("loha", "2309.14859", LoHa(rank=2, initializer="normal"),
                       {"A1": (12, 2), "B1": (2, 8), "A2": (12, 2), "B2": (2, 8)}, in_model=False),
    "lokr": Row("lokr", "2309.14859", LoKr(rank=1), {"W1": (3, 2), "A2": (4, 1), "B2": (1, 4)}),
    "lokr-lycoris": Row("lokr", "2309.14859", LoKr(rank=1, decompose_both=True, initializer="lycoris", factor=2),
                        {"W1": (2, 2), "A2": (6, 1), "B2": (1, 4)}, in_model=False),
    "hira": Row("hira", "TwJrTz9cRS", HiRA(rank=4), LORA, lr=0.1),
    "gralora": Row("gralora", "2505.20355", GraLoRA(rank=4, alpha=8.0), LORA),
    "gralora-hybrid": Row("gralora", "2505.20355", GraLoRA(rank=4, alpha=8.0, hybrid_rank=2),
                          LORA | {"A0": (12, 2), "B0": (2, 8)}, in_model=False),
    "miss": Row("miss", "2409.15371", MiSS(rank=5), {"D": (5, 8)}, drawn=False),
    "miss-bat": Row("miss", "2409.15371", MiSS(rank=4, mode="bat"), {"D": (2, 4, 4)}, drawn=False, in_model=False),
    "miss-mini": Row("miss", "2409.15371", MiSS(rank=6, mode="mini", mini_rank=4), {"D": (6, 4)}, drawn=False,
                     in_model=False),
    "delora": Row("delora", "2503.18225", DeLoRA(rank=4, strength=2.0), LORA | {"lam": (), "norm": (12,)}),
    "delora-residual": Row("delora", "2503.18225", DeLoRA(rank=4, strength=2.0, initializer="residual"),
                           LORA | {"lam": (), "norm": (12,), "A0": (12, 4), "B0": (4, 8)}, in_model=False),
    "ia3": Row("ia3", "2205.05638", IA3(), {"l_out": (8,)}, drawn=False, lr=0.1),
    "ia3-in": Row("ia3", "2205.05638", IA3(side="in"), {"l_in": (12,)}, drawn=False, in_model=False),
    "kasa": Row("kasa", "2412.06071", KaSA(rank=4), LORA | {"d": (4,), "A0": (12, 4), "B0": (4, 8)}, identity=False,
                penalised=True),
    "shira": Row("shira", "2406.13175", SHiRA(rank=4), {"values": (80,), "indices": (2, 80)}),
    "vera": Row("vera", "2310.11454", VeRA(rank=4, d_initial=0.5), VERA, drawn=False),
    "randlora": Row("randlora", "2502.00987", RandLoRA(rank=3, alpha=6.0), RANDLORA, drawn=False),
    "randlora-root-sparse": Row("randlora", "2502.00987", RandLoRA(rank=3, alpha=6.0, root=True, initializer="sparse"),
                                RANDLORA, drawn=False, in_model=False),
    "lora-xs": Row("lora_xs", "2405.17604", LoRAXS(rank=4, sigma=0.1), LORA | {"R": (4, 4)}, identity=False),
    "lora-xs-randomised": Row("lora_xs", "2405.17604", LoRAXS(rank=4, sigma=0.1, iterations=10), LORA | {"R": (4, 4)},
                              identity=False, in_model=False),
    "vb-lora": Row("vb_lora", "2405.15179", VBLoRA(rank=4, num_vectors=6, vector_length=4, bank_bound=0.5), VBLORA,
                   identity=False),
    "share-lora": Row("share_lora", "2406.10785", ShareLoRA(rank=4), LORA),
    "share-lora-ab": Row("share_lora", "2406.10785", ShareLoRA(rank=4, share="ab"), LORA, in_model=False),
    "hydralora": Row("hydralora", "2404.19245", HydraLoRA(rank=4, heads=3, alpha=4.0),
                     {"A": (12, 4), "B": (3, 4, 8), "G": (12, 3)}, merges=False),
    "molora": Row("molora", "2309.05444", MoLoRA(rank=4, experts=3),
                  {"A": (3, 12, 4), "B": (3, 4, 8), "G": (12, 3)}, merges=False),
    "molora-top-k": Row("molora", "2309.05444", MoLoRA(rank=2, experts=4, router="arrow", top_k=2, temperature=0.5),
                        {"A": (4, 12, 2), "B": (4, 2, 8), "G": (12, 4)}, merges=False, in_model=False),
    "trainable-tokens": Row("trainable_tokens", "2104.08691", TrainableTokens((2, 5), side="in"), {"rows": (2, 8)},
                            drawn=False),
    "trainable-tokens-head": Row("trainable_tokens", "2104.08691", TrainableTokens((7, 1, 0)), {"rows": (3, 12)},
                                 drawn=False, in_model=False),
    "oft": Row("oft", "2306.07280", OFT(block_size=4), {"Q": (3, 6)}, drawn=False),
    "oft-shared-exact": Row("oft", "2306.07280", OFT(blocks=2, share=True, terms=0), {"Q": (1, 15)}, drawn=False,
                            in_model=False),
    "oft-bounded": Row("oft", "2306.07280", OFT(block_size=4, eps=0.1), {"Q": (3, 6)}, drawn=False, in_model=False),
    "dora-vera": Row("dora", "2402.09353", DoRA(VeRA(rank=4, d_initial=0.5)), VERA | NORMS, drawn=False,
                     in_model=False),
}


def started(row: Row, key: jax.Array, w: jax.Array, read: bool = True) -> tuple[Any, jax.Array]:
    """`init` of one matrix, with the data that it reads and the arrays that it would share with others; read: as it
    reads them."""
    variant = row.variant
    adapter, w_new = variant.init(key, w, row.stats)
    if any(leaf.shared for leaf in variant.leaves.values()):
        shared = variant.init_shared(key, *w.shape)
        adapter = adapter._replace(**(variant.read_shared(shared, *w.shape) if read else shared))
    return adapter, w_new


def perturbed(adapter: Any, draw: Any) -> Any:
    """`adapter` with every array replaced by noise: nothing is left at a start that hides half of the maths. Integers,
    which are positions in a weight, are replaced by small ones. A dict is the arrays of a shared slot."""
    def noise(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) * 5 % 8
        return 0.3 * draw(x.shape) + (0.5 if x.ndim == 0 else 0.0)  # one number alone may happen to be next to 0

    if isinstance(adapter, dict):
        return {name: noise(x) for name, x in adapter.items()}
    noisy = type(adapter)(*(None if x is None else noise(x) for x in adapter))
    if getattr(noisy, "weight_norm", None) is not None:  # DoRA: of columns that are shorter than 2 in these tests
        noisy = noisy._replace(weight_norm=2 + abs(noisy.weight_norm))
    return noisy
