"""GGUF, ONNX and CTranslate2 files: small ones written here come back exactly; real ones do what they should."""

import random
import struct
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import config, language
from lorajax.core.packed import is_packed, unpacked
from lorajax.core.sites import by_path
from lorajax.io import assets
from lorajax.io.ctranslate2 import open_whisper, read_variables
from lorajax.io.gguf import open_gguf
from lorajax.io.onnx import open_dinov2
from lorajax.models import ViT, ViTConfig, Whisper, WhisperConfig, model_from_hf, params_from_hf, params_to_hf
from lorajax.models.generation import generate

# --- GGUF ---

GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute` of convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def case() -> golden.Case:
    return golden.load("lora_qv_llama")


@pytest.fixture(scope="module")
def bpe() -> Any:
    """A small byte-level BPE tokenizer, trained here, with 96 tokens: two of them special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<|end|>", "<|im|>"], show_progress=False)
    text = "the capital of France is Paris, 2026 and the rest of the capitals are here"
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def write_gguf(file: Path, case: golden.Case, bpe: Any, architecture: str = "llama", kind: Any = None) -> None:
    import json

    import gguf

    tokenizer = json.loads(bpe.to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    tokens += [f"<|unused{i}|>" for i in range(96 - len(tokens))]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_eos_token_id(0)
    for name, array in params_to_hf(case.model.config, case.params).items():  # type: ignore[attr-defined]
        short = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        short = short.replace("lm_head", "output").replace("model.layers.", "blk.")
        for theirs, ours in GGUF_NAMES.items():
            short = short.replace(theirs, ours)
        if "attn_q." in short or "attn_k." in short:
            array = turned(array, 4 if "attn_q" in short else 2)
        if kind is None or array.ndim == 1:
            writer.add_tensor(short, np.ascontiguousarray(array))
        else:
            writer.add_tensor(short, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_read_exactly(case: golden.Case, bpe: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", case, bpe)
    found = open_gguf(tmp_path / "a.gguf")
    model = model_from_hf(found.config)
    variables = params_from_hf(model.config, found.tensors).variables  # type: ignore[attr-defined]
    jax.tree.map(np.testing.assert_array_equal, variables, case.params)
    for text in ("the capital of 2026, France", "Paris<|end|> is <|im|>here", "  rest\n\n of it"):
        assert found.tokenizer.encode(text).ids == bpe.encode(text).ids
        assert found.tokenizer.decode(bpe.encode(text).ids) == bpe.decode(bpe.encode(text).ids)
    assert found.special["eos"] == 0


def test_gguf_is_dequantised(case: golden.Case, bpe: Any, tmp_path: Path) -> None:
    """Q8_0: 32 elements share a step, their largest / 127 rounded to float16: off by 1/2 + 127 / 2^11 steps at most."""
    import gguf

    write_gguf(tmp_path / "a.gguf", case, bpe, kind=gguf.GGMLQuantizationType.Q8_0)
    tensors = open_gguf(tmp_path / "a.gguf").tensors
    exact = params_to_hf(case.model.config, case.params)  # type: ignore[attr-defined]
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        blocks, have = exact[name].reshape(-1, 32), tensors[name].reshape(-1, 32)
        step = np.abs(blocks).max(1, keepdims=True) / 127
        assert (np.abs(have - blocks) <= (0.5 + 127 / 2**11) * step).all() and (have != blocks).any()
        assert tensors.shape(name) == exact[name].shape


def test_gguf_errors(case: golden.Case, bpe: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", case, bpe, architecture="mamba")
    with pytest.raises(ValueError, match="architecture 'mamba'; these are read: llama, qwen2, qwen3"):
        open_gguf(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    for cut in (0, 3, 20, 200, len(data) // 2):
        (tmp_path / "b.gguf").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="truncated or not GGUF"):
            open_gguf(tmp_path / "b.gguf")
    with pytest.raises(FileNotFoundError, match="no file"):
        open_gguf(tmp_path / "c.gguf")


def damaged(data: bytes, rng: random.Random, head: int) -> bytes:
    """Bits flipped, cut, overwritten with huge and small numbers within the first `head` bytes, or random."""
    kind, made, at = rng.randrange(4), bytearray(data), rng.randrange(min(head, len(data) - 8))
    if kind == 0:
        made[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        return data[: rng.randrange(len(data))]
    elif kind == 2:
        made[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), struct.pack("<Q", 2**40), rng.randbytes(8)])
    else:
        return rng.randbytes(rng.randrange(300))
    return bytes(made)


def survives(read: Any) -> bool:
    """Whether it read; the only other outcome allowed is a ValueError that says something."""
    try:
        read()
    except ValueError as error:
        assert len(str(error)) > 20
        return False
    return True


def test_hundreds_of_damaged_gguf_files(case: golden.Case, bpe: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", case, bpe)
    whole, rng, file, read = (tmp_path / "a.gguf").read_bytes(), random.Random(0), tmp_path / "b.gguf", 0
    for _ in range(300):
        file.write_bytes(damaged(whole, rng, 6000))
        read += survives(lambda: [np.asarray(x) for x in open_gguf(file).tensors.values()])
    assert read < 150  # a number of the metadata, the text of a token


def test_gguf_tensors_stay_quantised_as_they_are(tmp_path: Path, case: golden.Case, bpe: Any) -> None:
    import gguf

    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
        write_gguf(tmp_path / "model.gguf", case, bpe, kind=kind)
        tensors = open_gguf(tmp_path / "model.gguf").tensors
        found = {name: kept for name in tensors if (kept := tensors.packed(name)) is not None}
        assert {type(kept.format).__name__ for kept in found.values()} == {kind.name}
        assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= set(found)
        for name, kept in found.items():
            np.testing.assert_array_equal(kept.dense(), tensors[name].T, err_msg=name)
            np.testing.assert_array_equal(tensors.packed(name, transposed=False).dense(), tensors[name])
    c = config.load(f"configs/qlora.py:model={tmp_path / 'model.gguf'}")
    loaded = []
    for c.quant.format in ("gguf", ""):
        loaded.append(by_path(language.load_model(c).variables)[0])
    assert sum(is_packed(w) for w in loaded[0].values()) >= 14
    for path, w in loaded[0].items():
        np.testing.assert_array_equal(unpacked(w), loaded[1][path], err_msg=path)


@pytest.mark.parametrize("scan", [False, True])
def test_gguf_bits_lie_on_a_mesh(tmp_path: Path, case: golden.Case, bpe: Any, scan: bool) -> None:
    import gguf

    write_gguf(tmp_path / "model.gguf", case, bpe, kind=gguf.GGMLQuantizationType.Q8_0)
    c = config.load(f"configs/qlora.py:model={tmp_path / 'model.gguf'}")
    c.quant.format, c.scan_layers = "gguf", scan
    alone = language.load_model(c)
    c.mesh.fsdp, c.mesh.tensor = 2, 2
    model = language.load_model(c)
    assert model.fingerprint == alone.fingerprint
    one, spread = by_path(alone.variables)[0], by_path(model.variables)[0]
    assert sum(is_packed(w) for w in spread.values()) == (9 if scan else 16)
    for path, w in spread.items():
        for got, want in zip(jax.tree.leaves(w), jax.tree.leaves(one[path]), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=path)
        if path.endswith("kernel"):  # of heads and of the feed-forward layer: a quarter on each of four devices
            assert len({str(x.index) for x in w.codes.addressable_shards}) == 4, path


# --- ONNX ---


def test_onnx_weights_get_their_names_back(tmp_path: Path) -> None:
    """Anonymous (in, out) constants behind MatMul nodes, as PyTorch exports linear layers, and folded positions."""
    import onnx
    from onnx import helper, numpy_helper

    config = ViTConfig(family="dinov2", image_size=6, patch_size=3, hidden_size=64, num_layers=2, num_heads=1,
                       intermediate_size=128, num_labels=0, norm_eps=1e-6)  # fmt: skip
    variables = golden.variables(ViT(config), jnp.zeros((1, 6, 6, 3)))
    nodes, constants = [], []
    for i, (name, array) in enumerate(params_to_hf(config, variables).items()):
        module, leaf = name.replace("dinov2.", "backbone.").rsplit(".", 1)
        node = module.replace(".", "/").replace("layer/", "layer.")
        if leaf == "weight" and array.ndim == 2:
            constants.append(numpy_helper.from_array(np.ascontiguousarray(array.T), f"onnx::MatMul_{i}"))
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{i}"], [f"y{i}"], f"/{node}/MatMul"))
        elif leaf == "position_embeddings":
            for part, piece in (("rest", array[:, 1:]), ("first", array[:, :1])):
                constants.append(numpy_helper.from_array(np.ascontiguousarray(piece), f"onnx::{part}"))
                nodes.append(helper.make_node("Identity", [f"onnx::{part}"], [part], f"/backbone/embeddings/{part}"))
        else:
            constants.append(numpy_helper.from_array(array, f"{module}.{leaf}"))
    constants.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "decoder.weight"))
    graph = helper.make_graph(nodes, "g", [], [], constants)
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    found = open_dinov2(tmp_path / "a.onnx")
    again = ViTConfig.from_hf(found.config, num_labels=0)
    loaded = params_from_hf(again, found.tensors, ignore=[r"decoder\..*"])
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    assert (again.image_size, again.num_heads, again.num_layers) == (6, 1, 2) and loaded.ignored == ("decoder.weight",)
    (tmp_path / "b.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="truncated or not ONNX"):
        open_dinov2(tmp_path / "b.onnx")


# --- CTranslate2 ---


def write_ctranslate2(file: Path, variables: dict[str, np.ndarray], version: int = 6) -> None:
    out = [struct.pack("<I", version)]
    out += [struct.pack("<H", 12), b"WhisperSpec\0", struct.pack("<II", 3, len(variables))]
    kinds = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    for name, array in variables.items():
        text = name.encode() + b"\0"
        out.append(struct.pack(f"<H{len(text)}sB{array.ndim}I", len(text), text, array.ndim, *array.shape))
        out.append(struct.pack("<BI", kinds[array.dtype.name], array.nbytes) + array.tobytes())
    file.write_bytes(b"".join(out) + struct.pack("<I", 0))


def whisper_variables(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of CTranslate2's converter, written out for one layer of each side."""
    found = {f"{side}/num_heads": np.asarray(2, np.int16) for side in ("encoder", "decoder")}
    found["decoder/embeddings/weight"] = tensors["decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        found[f"{side}/position_encodings/encodings"] = tensors[f"{side}.embed_positions.weight"]
        here, there = f"{side}/layer_0", f"{side}.layers.0"
        for leaf in ("weight", "bias"):
            norm, part = {"weight": "gamma", "bias": "beta"}[leaf], {}
            found[f"{side}/layer_norm/{norm}"] = tensors[f"{side}.layer_norm.{leaf}"]
            for block in ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",):
                part = {p: tensors.get(f"{there}.{block}.{p}_proj.{leaf}", np.zeros(8, np.float32))
                        for p in ("q", "k", "v", "out")}  # fmt: skip
                short = {"self_attn": "self_attention", "encoder_attn": "attention"}[block]
                fused = [["q", "k", "v"], ["out"]] if block == "self_attn" else [["q"], ["k", "v"], ["out"]]
                for i, names in enumerate(fused):
                    found[f"{here}/{short}/linear_{i}/{leaf}"] = np.concatenate([part[p] for p in names])
                found[f"{here}/{short}/layer_norm/{norm}"] = tensors[f"{there}.{block}_layer_norm.{leaf}"]
            found[f"{here}/ffn/layer_norm/{norm}"] = tensors[f"{there}.final_layer_norm.{leaf}"]
            for i in (0, 1):
                found[f"{here}/ffn/linear_{i}/{leaf}"] = tensors[f"{there}.fc{i + 1}.{leaf}"]
                if side == "encoder":
                    found[f"encoder/conv{i + 1}/{leaf}"] = tensors[f"encoder.conv{i + 1}.{leaf}"]
    return found


def test_ctranslate2_whisper_is_read_exactly(tmp_path: Path) -> None:
    config = WhisperConfig(vocab_size=11, mels=4, hidden_size=8, num_layers=1, num_decoder_layers=1, num_heads=2,
                           num_decoder_heads=2, intermediate_size=12, decoder_intermediate_size=12, max_positions=6,
                           max_target_positions=8)  # fmt: skip
    variables = golden.variables(Whisper(config), jnp.zeros((1, 4, 4)), jnp.zeros((1, 2), jnp.int32))
    tensors = {name.removeprefix("model."): x for name, x in params_to_hf(config, variables).items()}
    written = whisper_variables(tensors)
    write_ctranslate2(tmp_path / "model.bin", written)
    found = open_whisper(tmp_path)
    again = WhisperConfig.from_hf(found.config)
    assert (again.num_heads, again.num_decoder_heads, again.intermediate_size, again.mels) == (2, 2, 12, 4)
    loaded = params_from_hf(again, found.tensors)
    assert loaded.ignored == ()
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    data = (tmp_path / "model.bin").read_bytes()
    for cut in (0, 3, 10, 40, len(data) // 2):
        (tmp_path / "b.bin").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="truncated or no CTranslate2 model"):
            read_variables(tmp_path / "b.bin")
    rng, read = random.Random(0), 0
    for _ in range(1000):
        (tmp_path / "model.bin").write_bytes(damaged(data, rng, 600))
        read += survives(lambda: open_whisper(tmp_path))
    assert read < 500  # a number of a weight
    bias = "encoder/layer_0/self_attention/linear_0/bias"
    write_ctranslate2(tmp_path / "model.bin", written | {bias: np.ones(24, np.float32)})
    with pytest.raises(ValueError, match="k_proj.bias' is not zero"):
        open_whisper(tmp_path)
    write_ctranslate2(tmp_path / "model.bin", written | {"encoder/conv1/weight_scale": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="is quantised"):
        open_whisper(tmp_path)
    write_ctranslate2(tmp_path / "model.bin", {}, version=5)
    with pytest.raises(ValueError, match="version 5 of the format, 6 is read"):
        open_whisper(tmp_path)


# --- real weights ---


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder of an asset that is in the cache already; skips otherwise, for tests do not download."""

    def no_download(*_: Any) -> None:
        raise OSError("this test does not download")

    def folder(name: str) -> Path:
        monkeypatch.setattr(assets, "_install", no_download)
        try:
            return assets.resolve(name).path
        except FileNotFoundError:
            pytest.skip(f"the weights are not in the cache: lorajax.io.assets.resolve({name!r}) fetches them")

    return folder


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(cached: Any) -> None:
    found = open_gguf(cached("smollm2") / "model.gguf")
    model: Any = model_from_hf(found.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    loaded = params_from_hf(model.config, found.tensors)
    assert loaded.fresh == () and loaded.ignored == ()
    assert sum(x.size for x in jax.tree.leaves(loaded.variables)) == 134_515_008
    ids = jnp.asarray([found.tokenizer.encode("The capital of France is").ids])
    assert ids.tolist() == [[504, 3575, 282, 4649, 314]]

    @jax.jit
    def complete(variables: Any, ids: jax.Array) -> jax.Array:
        def decode(ids: jax.Array, cache: Any) -> Any:
            return model.apply(variables, ids, cache, method="decode")

        logits, cache = decode(ids, model.empty_cache(1, 8))
        return generate(decode, cache, logits[:, -1], max_new=2, eos_id=found.special["eos"])

    assert found.tokenizer.decode(complete(loaded.variables, ids)[0].tolist()) == " Paris."


@pytest.mark.slow
def test_dinov2_features_equal_the_onnx_program(cached: Any) -> None:
    """The file's own graph, run by onnx's reference evaluator in NumPy up to the encoder's last norm."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    file = cached("dinov2-small") / "model.onnx"
    program = onnx.load(file)
    (last,) = [node for node in program.graph.node if "backbone.layernorm.bias" in node.input]
    program.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], 1, None))
    pixels = np.random.default_rng(0).normal(size=(1, 3, 70, 56)).astype(np.float32)
    (want,) = ReferenceEvaluator(program).run([last.output[0]], {"input_image": pixels})
    found = open_dinov2(file)
    model = model_from_hf(found.config, num_labels=0)
    variables = params_from_hf(model.config, found.tensors, ignore=[r"decoder\..*"]).variables  # type: ignore[attr-defined]
    have = model.apply(variables, pixels.transpose(0, 2, 3, 1), method="hidden")
    assert want.shape == (1, 21, 384)
    np.testing.assert_allclose(have, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.data
def test_dinov2_features_tell_images_apart(cached: Any) -> None:
    """CIFAR-10: the nearest of 300 images has the same label more often by features than by pixels."""
    import io
    import os

    import pyarrow.parquet

    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder = Path(os.environ.get("LORAJAX_DATA", "/nowhere"), "cifar10")
    if not folder.is_dir():
        pytest.skip("LORAJAX_DATA does not name a folder with cifar10")

    def read(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = pyarrow.parquet.read_table(folder / f"{name}.parquet").slice(0, count).to_pydict()
        pixels = [np.asarray(image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows["img"]]
        scaled = (np.stack(pixels) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return scaled.astype(np.float32), np.asarray(rows["label"])

    found = open_dinov2(cached("dinov2-small") / "model.onnx")
    model = model_from_hf(found.config, num_labels=0)
    variables = params_from_hf(model.config, found.tensors, ignore=[r"decoder\..*"]).variables  # type: ignore[attr-defined]

    @jax.jit
    def features(variables: Any, pixels: jax.Array) -> jax.Array:
        larger = jax.image.resize(pixels, (len(pixels), 84, 84, 3), "cubic")
        return model.apply(variables, larger, method="features")

    (known, labels), (asked, truth) = read("train", 300), read("test", 100)

    def accuracy(known: np.ndarray, asked: np.ndarray) -> float:
        known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, asked))
        return float((labels[(asked @ known.T).argmax(1)] == truth).mean())

    def seen(pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([features(variables, pixels[i : i + 100]) for i in range(0, len(pixels), 100)])

    by_pixels = accuracy(known.reshape(300, -1), asked.reshape(100, -1))
    assert accuracy(seen(known), seen(asked)) > by_pixels + 0.1  # measured: 0.37 against 0.22


@pytest.mark.slow
@pytest.mark.peft
def test_whisper_equals_transformers_with_real_weights(cached: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: peft)")
    found = open_whisper(cached("whisper-tiny-en"))
    settings = {name: value for name, value in found.config.items() if name != "model_type"}
    theirs = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**settings, pad_token_id=50256))
    state = {name: torch.tensor(x.astype(np.float32)) for name, x in found.tensors.items()}
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert missing == ["proj_out.weight"] and not extra
    theirs.tie_weights()
    rng = np.random.default_rng(0)
    sound, ids = rng.normal(size=(1, 80, 3000)).astype(np.float32), np.asarray([[50257, 50362, 464, 3139]])
    with torch.no_grad():
        want = theirs.eval()(input_features=torch.tensor(sound), decoder_input_ids=torch.tensor(ids)).logits.numpy()
    model = model_from_hf(found.config)
    variables = params_from_hf(model.config, found.tensors).variables  # type: ignore[attr-defined]
    have = jax.jit(model.apply)(variables, sound.transpose(0, 2, 1), jnp.asarray(ids))
    np.testing.assert_allclose(have, want, atol=2e-3, rtol=1e-3)  # logits reach 30
