"""Files of adapters that are damaged, hostile or of another kind: one clear error, never a crash, never a pickle."""

import copy
import functools
import json
import random
import struct
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save

import lorajax as lj
from lorajax.io import peft
from lorajax.io.peft_config import Config
from lorajax.io.tensors import AdapterError, read_tensors
from lorajax.models import adapter_names


@pytest.fixture(scope="module")
def case() -> golden.Case:
    return golden.load("lora_qv_llama")


@pytest.fixture(scope="module")
def sites(case: golden.Case) -> Any:
    return lj.sites(functools.partial(case.model.apply, **case.inputs), case.params)


@pytest.fixture(scope="module")
def names(case: golden.Case) -> Any:
    return adapter_names(case.model.config)  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path, case: golden.Case) -> Path:
    (tmp_path / "a").mkdir()
    for file in (case.folder / "adapter").iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "a"


def survives(read: Any) -> bool:
    """Whether it read; the only other outcome allowed is an AdapterError that says something."""
    try:
        read()
    except AdapterError as error:
        assert len(str(error)) > 20
        return False
    return True


def mutated(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, kind = bytearray(data[: 8 + size]), rng.randrange(6)
    if kind == 0:  # bits, mostly of the header
        for _ in range(rng.choice([1, 1, 2, 8])):
            header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
        return bytes(header) + data[8 + size :]
    if kind == 1:  # cut anywhere
        return data[: rng.randrange(len(data))]
    if kind == 2:  # another header length, up to the largest
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    if kind == 3:  # random bytes
        return rng.randbytes(rng.randrange(200))
    rows = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in rows if key != "__metadata__"])
    if kind == 4:
        key = rng.choice(["dtype", "shape", "data_offsets"])
        rows[name][key] = rng.choice([None, -1, "F32", "I8", "U64", [], [-1], [2**62, 2**62], [0, 2**63], [4.0, 64],
                                      [True, 64], [1] * 40, {}, [[4], 64], [0, 0], [64, 4], "F64", 2**70])
    else:
        rows[rng.choice(["../../etc/passwd", "", "lora_A.weight", "base_model.model..lora_A.weight", "\x00", "x" * 5000,
                         name.replace("lora_A", "lora_B"), name.replace("layers.0", "layers.99")])] = rows.pop(name)
    text = json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def test_thousands_of_damaged_files(folder: Path, sites: Any, names: Any) -> None:
    rng, file = random.Random(0), folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    assert survives(lambda: peft.read(folder, sites, names))
    read = 0
    for _ in range(3000):
        file.write_bytes(mutated(whole, rng))
        read += survives(lambda: peft.read(folder, sites, names))
    assert read < 300  # what reads is as good as whole: an exponent of a number, a name in the metadata


def test_thousands_of_damaged_settings(case: golden.Case, sites: Any, names: Any) -> None:
    rng = random.Random(1)
    whole = json.loads((case.folder / "adapter" / "adapter_config.json").read_text())
    tensors = read_tensors(case.folder / "adapter" / "adapter_model.safetensors")[0]
    values = [None, True, -1, 0, 3, 1e400, float("nan"), 2**80, "", "(", "q_proj", "pissa", [], ["("], [1], {},
              {"(": 4}, {"q_proj": "x"}, {"q_proj": 2}, {"q_proj": 1e300}, [[]], {"a": {}}, "LOHA", "IA3",
              "ADALORA", "MISS", "HIRA"]
    read = 0
    for _ in range(3000):
        config = copy.deepcopy(whole)
        for _ in range(rng.choice([1, 1, 2])):
            config[rng.choice([*config, "unheard_of"])] = rng.choice(values)
        read += survives(lambda config=config: peft_parse(config, tensors, sites, names))
    assert 0 < read < 2000


def peft_parse(config: dict[str, Any], tensors: Any, sites: Any, names: Any) -> Any:
    from lorajax.io.peft_read import parse

    return parse(Config(config, "adapter_config.json"), tensors, sites, names)


@pytest.mark.parametrize(("text", "words"), [
    (b"", "not JSON"), (b"[]", "holds a list, not an object"), (b"\xff\xfe", "not JSON"), (b"[" * 100_000, "not JSON"),
    (b'{"peft_type": 7}', "peft_type=7 is no str"), (b"{}", "peft_type 'NONE' is none that lorajax has"),
])  # fmt: skip
def test_settings_that_are_none(folder: Path, sites: Any, names: Any, text: bytes, words: str) -> None:
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError, match=words):
        peft.read(folder, sites, names)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "lora.ckpt"])
def test_a_pickle_is_refused_with_the_way_out(folder: Path, sites: Any, names: Any, name: str) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(AdapterError, match="is a pickle, and loading one can run code: refused.*save_file"):
        read_tensors(folder / name)
    words = "is a pickle" if name == "adapter_model.bin" else "cannot be read"
    with pytest.raises(AdapterError, match=words):
        peft.read(folder, sites, names)


def test_an_enormous_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(AdapterError, match="its header would have 4611686018427387904 bytes"):
        read_tensors(file)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    import ml_dtypes

    made = {"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.int64), "c": np.zeros((0, 5), np.float16),
            "d": np.ones((2,), ml_dtypes.bfloat16), "e": np.array(3, np.float32)}
    (tmp_path / "x.safetensors").write_bytes(save(made, {"format": "pt"}))
    found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and found.keys() == made.keys()
    for name, x in made.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def edited(folder: Path, settings: Any = None, tensors: Any = None) -> None:
    if settings is not None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if tensors is not None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(save(tensors(load_file(file))))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("settings", "tensors", "words"), [
    ({"peft_type": "FOURIERFT"}, None, "FOURIERFT adapter cannot be read .*: .*torch's generator.*save_as_lora"),
    ({"peft_type": "BOFT"}, None, "'BOFT' is none that lorajax has; it reads LORA"),
    ({"init_lora_weights": "pissa_niter_16"}, None, "randomised SVD.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "lora_ga"}, None, "PEFT itself reloads it wrongly"),
    ({"use_qalora": True}, None, "use_qalora=True is not supported and may change"),
    ({"alora_invocation_tokens": [1]}, None, r"alora_invocation_tokens=\[1\] is not supported"),
    ({"some_new_maths": 3}, None, "some_new_maths=3 is not supported"),
    ({"r": 5}, None, r"has shape \(4, 64\), expected \(5, 64\)"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, None, "target 2 modules that the file has no tensors for"),
    (None, lambda t: {k: v for k, v in t.items() if k != KEY}, "has no tensor model.layers.0.self_attn.q_proj.lora_A"),
    (None, lambda t: t | {KEY: t[KEY].astype(np.int32)}, "is int32; an adapter's are"),
    (None, lambda t: t | {KEY: t[KEY] * np.inf}, "holds NaN or infinity"),
    (None, lambda t: t | {KEY.replace("layers.0", "layers.7"): t[KEY]},
     "no module 'model.layers.7.self_attn.q_proj' .the nearest name in this model is 'model.layers.[01].self_attn"),
    (None, lambda t: t | {"base_model.model.score.weight": t[KEY]}, "no place for it"),
    (None, lambda t: t | {KEY.removeprefix("base_model.model."): t[KEY]}, "is in the file twice"),
])  # fmt: skip
def test_what_cannot_be_read_says_why(folder: Path, sites: Any, names: Any, settings: Any, tensors: Any,
                                      words: str) -> None:
    edited(folder, settings, tensors)
    with pytest.raises(AdapterError, match=words):
        peft.read(folder, sites, names)
