"""Reads GGUF files of the Llama family (llama.cpp's format): config, tensors under Hugging Face's names, tokenizer.

The container and its quantised types are read by the `gguf` package (extra: weights). Tensors are dequantised one at a
time, when they are asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from lorajax.quant import Q4_1, Q8_0, Format, Quantized

_NAMES = {
    r"token_embd\.": "model.embed_tokens.",
    r"output_norm\.": "model.norm.",
    r"output\.": "lm_head.",
    r"blk\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"blk\.(\d+)\.ffn_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"blk\.(\d+)\.attn_(q|k|v)\.": r"model.layers.\1.self_attn.\2_proj.",
    r"blk\.(\d+)\.attn_(q|k)_norm\.": r"model.layers.\1.self_attn.\2_norm.",
    r"blk\.(\d+)\.attn_output\.": r"model.layers.\1.self_attn.o_proj.",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.": r"model.layers.\1.mlp.\2_proj.",
}
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"), "qwen2": _QWEN}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PRETOKENIZERS = ("default", "gpt-2", "smollm", *_SPLITS)


class Gguf(NamedTuple):
    """config: what a Hugging Face config.json would say; tensors: name -> float32 array, read lazily; tokenizer; the
    chat template (Jinja) or ''; ids of special tokens by name (`bos`, `eos`, `padding`, ...)."""

    config: dict[str, Any]
    tensors: GgufTensors
    tokenizer: Tokenizer
    chat_template: str
    special: dict[str, int]

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... -> the token, as Hugging Face's files and chat templates name them."""
        names = {"unknown": "unk", "padding": "pad", "seperator": "sep", "separator": "sep"}
        found = {names.get(name, name): self.tokenizer.id_to_token(i) for name, i in self.special.items()}
        return {f"{name}_token": token for name, token in found.items() if token is not None}


class GgufTensors(Mapping[str, np.ndarray]):
    """Tensors of a GGUF file as a read-only mapping by Hugging Face's names."""

    def __init__(self, reader: Any, config: Mapping[str, Any]) -> None:
        self._tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
        self._heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        self._turned = config["model_type"] == "llama"

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf import quants

        tensor = self._tensors[name]
        array = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(self.shape(name))
        return self._unturned(name, array)

    def packed(self, name: str, dtype: Any = np.float32, transposed: bool = True) -> Quantized | None:
        """A tensor as the file has it, Q8_0 or Q4_1, as a quantised weight: the same values as `self[name]`, in the
        file's bits, on the host. None for another type. transposed: the weight is (in, out), the file's tensor (out,
        in)."""
        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        if kind not in ("Q8_0", "Q4_1"):
            return None
        blocks = np.asarray(tensor.data).reshape(*self.shape(name)[:-1], -1, 34 if kind == "Q8_0" else 20)
        if kind == "Q8_0":
            scales, codes = [blocks[..., :2]], blocks[..., 2:].view(np.int8)
        else:  # a byte holds an element of the block's first half below one of its second half
            scales, halves = [blocks[..., :2], blocks[..., 2:4]], blocks[..., 4:]
            each = np.concatenate([halves & 15, halves >> 4], -1)
            codes = (each[..., ::2] << 4) | each[..., 1::2]
        halfs = [np.ascontiguousarray(x).view(np.float16)[..., 0] for x in scales]
        stored: list[np.ndarray] = [codes.reshape(*codes.shape[:-2], -1), *halfs]
        arrays: list[Any] = [self._unturned(name, x) for x in stored]
        form: Format = Q8_0() if kind == "Q8_0" else Q4_1()
        return Quantized(arrays[0], tuple(arrays[1:]), form, (1, 0) if transposed else (0, 1), (), np.dtype(dtype))

    def _unturned(self, name: str, array: np.ndarray) -> np.ndarray:
        """Rows in Hugging Face's order."""
        if self._turned and (part := re.search(r"self_attn\.(q|k)_proj\.", name)):
            # llama.cpp's files for 'llama' pair neighbouring dimensions of a head for the rotation, HF's its halves
            heads = self._heads[part.group(1)]
            array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without dequantising it."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))


def open_gguf(file: str | os.PathLike[str]) -> Gguf:
    """Opens a GGUF file: reads its metadata, maps its tensors.

    Errors: FileNotFoundError; ImportError without the `gguf` package; ValueError for a damaged file, an architecture
    or tokenizer that is not among ARCHITECTURES and PRETOKENIZERS, a stretched rope, missing metadata (each named).
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files are read by the package gguf: pip install 'lorajax[weights]'") from error
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}")
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        size = file.stat().st_size
        message = f"{str(file)!r} ({size} bytes) is truncated or not GGUF ({error}): download it again"
        raise ValueError(message) from error
    config = _config(file, fields, {tensor.name for tensor in reader.tensors})
    special = {
        match.group(1): int(value) for name, value in fields.items()
        if (match := re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", name))
    }  # fmt: skip
    tokenizer = _tokenizer(file, fields)
    return Gguf(config, GgufTensors(reader, config), tokenizer, str(fields.get("tokenizer.chat_template", "")), special)


def _config(file: Path, fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{str(file)!r} has the architecture {kind!r}; these are read: {', '.join(ARCHITECTURES)}")
    if fields.get(f"{kind}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise ValueError(f"{str(file)!r} has stretched rotary positions; take the model's safetensors instead")
    if f"{kind}.expert_count" in fields:
        raise ValueError(f"{str(file)!r} is a mixture of experts; take the model's safetensors instead")
    config = {theirs: fields[f"{kind}.{ours}"] for ours, theirs in _KEYS.items() if f"{kind}.{ours}" in fields}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    missing = sorted(set(_KEYS.values()) - set(config) - {"head_dim", "rope_theta"})
    if missing or "tokenizer.ggml.tokens" not in fields:
        raise ValueError(f"{str(file)!r} lacks metadata for {missing or 'the tokenizer'}")
    config |= {"model_type": kind, "hidden_act": "silu", "vocab_size": len(fields["tokenizer.ggml.tokens"])}
    return config | {"tie_word_embeddings": "output.weight" not in names}


def _name(name: str) -> str:
    """Hugging Face's name; one without is kept, so that loading names it."""
    for regex, replacement in _NAMES.items():
        if re.match(regex, name):
            return re.sub("^" + regex, replacement, name)
    return name


def _tokenizer(file: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """A byte-level BPE tokenizer with the file's vocabulary, merges and control tokens."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in PRETOKENIZERS:
        raise ValueError(f"{str(file)!r} has a tokenizer {kind!r} with the splits {split!r}; what is read is "
                         f"byte-level BPE ('gpt2') with {', '.join(PRETOKENIZERS)}")  # fmt: skip
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:  # the library's errors have no class of their own
        message = f"{str(file)!r} has a tokenizer that does not fit together ({error}): download it again"
        raise ValueError(message) from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in _SPLITS)
    first: list[Any] = []
    if split == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif split in _SPLITS:
        first = [pre_tokenizers.Split(Regex(_SPLITS[split]), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer
