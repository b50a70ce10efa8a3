"""Which of PEFT's methods are which variants: one row each, settings of the file <-> hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lorajax.core.sites import Site
from lorajax.core.variant import Variant
from lorajax.io.peft_config import Config
from lorajax.io.tensors import AdapterError
from lorajax.variants.adalora import AdaLoRA
from lorajax.variants.delora import DeLoRA
from lorajax.variants.dora import DoRA
from lorajax.variants.gralora import GraLoRA
from lorajax.variants.hira import HiRA
from lorajax.variants.ia3 import IA3
from lorajax.variants.loha import LoHa
from lorajax.variants.lokr import LoKr
from lorajax.variants.lora import LoRA
from lorajax.variants.mica import MiCA
from lorajax.variants.miss import MiSS
from lorajax.variants.oft import OFT
from lorajax.variants.trainable_tokens import TrainableTokens
from lorajax.variants.vera import VeRA


class Method(NamedTuple):
    """build: (config, module, site, rank of the module, its alpha) -> variant. settings: variant -> entries of
    adapter_config.json, without those of `rank` and `alpha`, the names of the settings that may differ by module where
    `patterns` are known. bias: PEFT's name for training the targets' biases, '' without bias modes. neutral: settings
    that change the maths -> the values at which they do not, with which alone it is read."""

    variant: type[Variant]
    build: Callable[[Config, str, Site, int, float], Variant]
    settings: Callable[[Any], dict[str, Any]]
    rank: str | None = "r"
    alpha: str | None = None
    default_alpha: float = 8
    patterns: tuple[str, ...] = ()
    bias: str = ""
    neutral: Mapping[str, tuple[Any, ...]] = {}


STARTS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa",
          "olora": "olora", "eva": "kaiming", "mica": "mica"}  # fmt: skip
REDONE = {
    "corda": "its start needs statistics of data that the file does not hold",
    "lora_ga": "its start needs gradients that the file does not hold, and PEFT itself reloads it wrongly",
    "loftq": "the base that it corrects is a quantised one that the file does not hold",
}
CONVERT = ("let PEFT write it as plain LoRA: model.save_pretrained(folder, path_initial_model_for_weight_conversion="
           "<folder of the adapter as initialised>)")


def _lora(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    start = c.get("init_lora_weights", True, bool, str)
    if isinstance(start, str) and (start in REDONE or start.startswith("pissa_niter")):
        reason = REDONE.get(start, "its start is a randomised SVD that depends on torch's generator")
        raise AdapterError(f"{c.file}: init_lora_weights={start!r} cannot be read faithfully: {reason}. {CONVERT}")
    if start not in STARTS:
        raise AdapterError(f"{c.file}: init_lora_weights={start!r} is unknown; known are {', '.join(map(str, STARTS))}")
    start = "embedding" if site.op == "lookup" and start is True else STARTS[start]
    rslora, dora = c.get("use_rslora", False, bool), c.get("use_dora", False, bool)
    dropout = c.number("lora_dropout", 0.0)
    if start == "mica" and not rslora and not dora:
        return MiCA(rank, alpha, dropout)
    lora = LoRA(rank, alpha, rslora, dropout, "kaiming" if start == "mica" else start)
    return DoRA(lora) if dora else lora


def _lora_settings(v: LoRA | DoRA) -> dict[str, Any]:
    inner = v.inner
    assert isinstance(inner, LoRA)
    return {"use_rslora": inner.rslora, "lora_dropout": inner.dropout, "use_dora": isinstance(v, DoRA)}


def _adalora(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    pattern = c.get("rank_pattern", None, dict) or {}
    kept = pattern.get(f"{module}.lora_E", pattern.get(f"base_model.model.{module}.lora_E"))
    if kept is not None and not (isinstance(kept, list) and all(isinstance(x, bool) for x in kept)):
        raise AdapterError(f"{c.file}: rank_pattern of {module} is {kept!r}, not a list of bools")
    start = c.integer("init_r", 12)
    left = start if kept is None else sum(kept)
    return AdaLoRA(left, alpha, None if left == start else start, c.number("orth_reg_weight", 0.5),
                   c.number("lora_dropout", 0.0))


def _adalora_settings(v: AdaLoRA) -> dict[str, Any]:
    first = v.rank if v.init_rank is None else v.init_rank
    return {"init_r": first, "target_r": first, "orth_reg_weight": v.orth, "lora_dropout": v.dropout, "total_step": 1,
            "r": 8}


def _lokr(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    window = site.n_in // site.shape[site.in_axes[-1]] if site.op == "conv" else 1
    return LoKr(rank, alpha, c.integer("decompose_factor", -1), c.get("decompose_both", False, bool), window=window)


def _ia3(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    return IA3("in" if c.matches(c.get("feedforward_modules", None, list, str) or [], module) else "out")


def _miss(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    start = c.get("init_weights", True, bool, str)
    mode = start if isinstance(start, str) else "standard"
    return MiSS(rank, mode, c.integer("mini_r", 1), c.number("miss_dropout", 0.0))


def _hira(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    return HiRA(rank, initializer="embedding" if site.op == "lookup" else "kaiming")


def _hira_settings(v: HiRA) -> dict[str, Any]:
    if v.s != 1.0:
        raise AdapterError(f"PEFT's HiRA has no scale, and this one has s={v.s}: {PLAIN}")
    return {"hira_dropout": 0.0}


def _delora_settings(v: DeLoRA) -> dict[str, Any]:
    if v.initializer != "zero_b" or v.floor != 1e-4:
        raise AdapterError(f"PEFT has DeLoRA with initializer='zero_b' and floor=1e-4 only: {PLAIN}")
    return {"delora_lambda": v.strength, "module_dropout": v.dropout}


def _lokr_settings(v: LoKr) -> dict[str, Any]:
    if v.initializer != "peft":
        raise AdapterError(f"PEFT scales LoKr by alpha / rank always, initializer='lycoris' does not: {PLAIN}")
    return {"decompose_both": v.decompose_both, "decompose_factor": v.factor}


def _miss_settings(v: MiSS) -> dict[str, Any]:
    return {"init_weights": True if v.mode == "standard" else v.mode, "mini_r": v.mini_rank, "miss_dropout": v.dropout}


def _vera(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    if not c.get("save_projection", True, bool):
        raise AdapterError(f"{c.file}: save_projection=False, and the projections cannot be drawn again: they come "
                           f"from torch's generator. Save the adapter once more with save_projection=True")
    return VeRA(rank, c.number("d_initial", 0.1), c.integer("projection_prng_key", 0), True,
                c.number("vera_dropout", 0.0))


def _vera_settings(v: VeRA) -> dict[str, Any]:
    return {"d_initial": v.d_initial, "projection_prng_key": v.projection_key, "save_projection": True,
            "vera_dropout": v.dropout}


def _oft(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    """PEFT takes the nearest number that divides the inputs, the lower of two."""
    if site.op != "matmul":
        raise AdapterError(f"{c.file}: {module} is a {site.op}, and lorajax has OFT for matmuls only: merge the "
                           f"adapter in PEFT, or convert it to plain LoRA (peft.save_as_lora)")
    series, version = c.get("use_cayley_neumann", True, bool), c.get("peft_version", "", str)
    if series and tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < (0, 18):
        raise AdapterError(f"{c.file}: written by PEFT {version or 'before 0.18'}, whose series of a rotation is "
                           f"another than today's: PEFT itself cannot read it faithfully, train it again")
    blocks, size = c.integer("r", 0), c.integer("oft_block_size", 32)
    fits = _nearest(blocks or size, site.n_in)
    return OFT(0 if blocks else fits, fits if blocks else 0, c.get("block_share", False, bool),
               c.integer("num_cayley_neumann_terms", 5) if series else 0,
               c.number("eps", 6e-5) if c.get("coft", False, bool) else 0.0)


def _nearest(asked: int, n: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - asked))


def one_block_size(given: Mapping[str, tuple[OFT, int]]) -> dict[str, int]:
    """The setting that PEFT turns into each module's own, from the variant and the inputs of each; {} if none does."""
    sizes = {(n_in // v.blocks if v.blocks else v.block_size, n_in) for v, n_in in given.values()}
    for key, wanted in (("oft_block_size", sizes), ("r", {(n_in // size, n_in) for size, n_in in sizes})):
        for asked in range(1, 1 + max(size for size, _ in wanted)):
            if all(_nearest(asked, n_in) == size for size, n_in in wanted):
                return {"r": 0, "oft_block_size": 0} | {key: asked}
    return {}


def _oft_settings(v: OFT) -> dict[str, Any]:
    return {"r": v.blocks, "oft_block_size": 0 if v.blocks else v.block_size, "block_share": v.share,
            "coft": v.eps > 0, "eps": v.eps or 6e-5, "use_cayley_neumann": v.terms > 0, "peft_version": "0.18.0",
            "num_cayley_neumann_terms": v.terms or 5, "module_dropout": 0.0}


def _tokens(c: Config, module: str, site: Site, rank: int, alpha: float) -> Variant:
    """Of PEFT's method of that name, and of `trainable_token_indices` beside LoRA: a list, or module -> list."""
    found = c.get("token_indices" if c.kind == "TRAINABLE_TOKENS" else "trainable_token_indices", [], list, dict)
    if isinstance(found, dict):
        found = next((tokens for name, tokens in found.items() if module == name or module.endswith(f".{name}")), [])
    if not isinstance(found, list) or not found or not all(type(t) is int for t in found):
        raise AdapterError(f"{c.file}: the settings name no tokens for {module}, whose rows the file holds: {found!r}")
    return TrainableTokens(tuple(found), "in" if site.op == "lookup" else "out")


PLAIN = "write it as a plain LoRA (lorajax.compose.as_lora), or keep lorajax's own format"
BOTH = ("rank_pattern", "alpha_pattern")
NO_CP = {"use_effective_conv2d": (False,)}
_NO_SPECIAL_LORA: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora"),
    (None, [], {}, False),
) | {"use_qalora": (False,)}  # fmt: skip

METHODS: Mapping[str, Method] = {
    "LORA": Method(LoRA, _lora, _lora_settings, alpha="lora_alpha", patterns=BOTH, bias="lora_only",
                   neutral=_NO_SPECIAL_LORA),
    "ADALORA": Method(AdaLoRA, _adalora, _adalora_settings, rank=None, alpha="lora_alpha", bias="lora_only",
                      neutral=_NO_SPECIAL_LORA | {"use_dora": (False,), "use_rslora": (False,)}),
    "LOHA": Method(LoHa, lambda c, m, site, r, alpha: LoHa(r, alpha), lambda v: {}, alpha="alpha", patterns=BOTH,
                   neutral=NO_CP),
    "LOKR": Method(LoKr, _lokr, _lokr_settings, alpha="alpha", patterns=BOTH, neutral=NO_CP),
    "HIRA": Method(HiRA, _hira, _hira_settings),  # PEFT has its rank_pattern in the settings, and never applies it
    "VERA": Method(VeRA, _vera, _vera_settings, bias="vera_only"),
    "IA3": Method(IA3, _ia3, lambda v: {}, rank=None),
    "MISS": Method(MiSS, _miss, _miss_settings, bias="miss_only"),
    "GRALORA": Method(
        GraLoRA, lambda c, m, site, r, alpha: GraLoRA(r, alpha, c.integer("gralora_k", 2), c.integer("hybrid_r", 0),
                                                      c.number("gralora_dropout", 0.0)),
        lambda v: {"gralora_k": v.k, "hybrid_r": v.hybrid_rank, "gralora_dropout": v.dropout},
        alpha="alpha", default_alpha=64, bias="gralora_only"),
    "DELORA": Method(DeLoRA, lambda c, m, site, r, alpha: DeLoRA(r, c.number("delora_lambda", 15),
                                                                 dropout=c.number("module_dropout", 0.0)),
                     _delora_settings, patterns=("rank_pattern",), bias="delora_only"),
    "OFT": Method(OFT, _oft, _oft_settings, rank=None, bias="oft_only"),
    "TRAINABLE_TOKENS": Method(TrainableTokens, _tokens, lambda v: {"token_indices": list(v.tokens)}, rank=None),
}  # fmt: skip
"""PEFT's `peft_type` -> its row. A variant with a row here and `Leaf.peft` names is read and written."""

_POSITIONS = "which entries it trains is drawn from torch's generator and not in the file"
REFUSED: Mapping[str, str] = {
    "FOURIERFT": _POSITIONS, "WAVEFT": _POSITIONS,
    "SHIRA": "its positions are drawn from torch's generator, and the file's are not bound to a place in it",
    "RANDLORA": "its bases are drawn from torch's generator", "UNILORA": _POSITIONS,
    "TINYLORA": "its projections are drawn from torch's generator", "FROD": "its rotation is not in the file",
    "PVERA": "its projections are drawn from torch's generator",
}  # fmt: skip
"""Methods whose files do not determine the adapter, with the reason."""


def method_of(variant: Variant) -> tuple[str, Method] | None:
    """(peft_type, row) of the method that a variant is, None if PEFT has none."""
    kind = type(variant.of if isinstance(variant, DoRA) and isinstance(variant.of, LoRA) else variant)
    return next(((name, row) for name, row in METHODS.items() if row.variant is kind), None)
