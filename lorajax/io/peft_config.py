"""`adapter_config.json`: settings by type, and PEFT's ways to name modules."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorajax.io.patterns import match_ends, matches
from lorajax.io.tensors import AdapterError, read_json

CONFIG = "adapter_config.json"
INERT = frozenset({
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "monteclora_config", "runtime_config", "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out", "init_weights",
    "init_ia3_weights", "init_lora_weights", "rank_dropout", "module_dropout", "rank_dropout_scale", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "bias", "lora_bias", "r", "lambda_pattern", "projection_prng_key", "d_initial",
    "save_projection", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step", "mini_r", "feedforward_modules", "decompose_both", "decompose_factor", "gralora_k", "hybrid_r",
    "delora_lambda", "lora_alpha", "alpha", "use_dora", "use_rslora", "token_indices", "trainable_token_indices",
    "target_parameters", "layer_replication",
    "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms",
})  # fmt: skip
"""Settings that are read, or that do not change what a trained adapter computes."""


class Config:
    """The settings of one file, checked by type where they are asked for: AdapterError names file, key and value."""

    def __init__(self, settings: Mapping[str, Any], file: str) -> None:
        self.settings, self.file = dict(settings), file

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Config:
        """From a folder; `peft_type` must be there."""
        file = Path(folder) / CONFIG
        config = cls(read_json(file), str(file))
        config.get("peft_type", None, str)
        return config

    @property
    def kind(self) -> str:
        """`peft_type` in capitals."""
        return str(self.settings.get("peft_type")).upper()

    def get(self, key: str, default: Any, *types: type) -> Any:
        """A setting of one of `types`, or `default`; null counts as absent."""
        value = self.settings.get(key)
        if value is None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise AdapterError(f"{self.file}: {key}={value!r} is no {' or '.join(t.__name__ for t in types)}")
        return value

    def integer(self, key: str, default: int) -> int:
        """A whole number below 2^31 in size."""
        value = self.get(key, default, int)
        if abs(value) >= 2**31:
            raise AdapterError(f"{self.file}: {key}={value!r} is out of range")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return self._finite(key, self.get(key, default, int, float))

    def names(self, key: str) -> list[str] | str | None:
        """A regex, a list of names, or None."""
        value = self.get(key, None, str, list)
        if isinstance(value, list) and not all(isinstance(x, str) for x in value):
            raise AdapterError(f"{self.file}: {key}={value!r} is no list of names")
        return value

    def by_module(self, key: str, default: float, pattern: str, module: str) -> float:
        """A number that `pattern`, an ordered table regex -> number, may set for a module: its first match wins."""
        table = self.get(pattern, None, dict) or {}
        for regex, value in table.items():
            if self._match(rf"(.*\.)?({regex})$", module):
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise AdapterError(f"{self.file}: {pattern}[{regex!r}]={value!r} is no number")
                return self._finite(pattern, value)
        return self.number(key, default)

    def matches(self, names: Sequence[str] | str, module: str) -> bool:
        """Whether a module is named by a regex (whole match), or by a list of names or ends of names."""
        if isinstance(names, str):
            return self._match(rf"(?:{names})\Z", module)
        return any(module == name or module.endswith(f".{name}") for name in names)

    def targeted(self, modules: Iterable[str]) -> set[str]:
        """Those of `modules` that PEFT would adapt."""
        targets = self.names("target_modules")
        if targets is None or targets == "all-linear":
            return set()
        excluded, saved = self.names("exclude_modules") or [], self.names("modules_to_save") or []
        found = {m for m in modules if self.matches(targets, m) and not (excluded and self.matches(excluded, m))}
        found = {m for m in found if not any(self._match(rf"(^|.*\.){name}($|\..*)", m) for name in saved)}
        layers = self.get("layers_to_transform", None, int, list)
        if layers is None or layers == [] or isinstance(targets, str):
            return found
        return {m for m in found if m in targets or self._layer(m) in ([layers] if isinstance(layers, int) else layers)}

    def _layer(self, module: str) -> int | None:
        """The first number in a name that counts layers."""
        patterns = self.names("layers_pattern")
        tried = [r".*?\.[^.]*\."] if not patterns else [
            rf"(?:^|.*?\.){p}\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
        for regex in tried:
            for end in sorted(self._safe(match_ends, regex, module)):
                if number := re.match(r"\d+(?=\.)", module[end:]):
                    return int(number.group())
        return None

    def _match(self, regex: str, module: str) -> bool:
        return self._safe(matches, regex, module)

    def _safe(self, ask: Callable[[str, str], Any], regex: str, module: str) -> Any:
        try:
            return ask(regex, module)
        except AdapterError as error:
            raise AdapterError(f"{self.file}: {error}") from error

    def _finite(self, key: str, value: float) -> float:
        if value != value or abs(value) > 1e30:
            raise AdapterError(f"{self.file}: {key}={value!r} is out of range")
        return value
