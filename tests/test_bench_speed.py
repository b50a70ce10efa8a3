"""The harness of the speed tables, on toy shapes: the same weights and losses on both sides, tables of what is there.
No times."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import kernels, ours, speed
from experiments.bench import work as shared
from experiments.bench.work import ROWS, TABLES, drawn, kind, seed, timed

LINE = {"row": "tiny", "blocks": 1, "steps a block": 1, "peak GiB": 1.0, "compile s": 2.0, "grad_norm": 3.0,
        "setting": {"date": "today"}}  # fmt: skip


def line(side: str, how: str, ms: float, loss: float = 4.0, **more: Any) -> dict[str, Any]:
    return {**LINE, "side": side, "how": how, "ms": ms, "low": ms, "high": ms, "losses": [loss], **more}


def test_weights_are_hashes_of_place_and_name() -> None:
    """Against the same hash in Python's whole numbers, and in the layout of our kernels."""
    name, shape = "model.layers.0.mlp.up_proj.weight", (5, 3)

    def one(i: int) -> float:
        h = (i * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**32
        h = (h ^ (h >> 15)) * 0x2C1B3C6D % 2**32
        h = (h ^ (h >> 12)) * 0x297A2D39 % 2**32
        return 0.02 * 3**0.5 * (((h ^ (h >> 15)) >> 8) / 2**23 - 1)

    want = np.reshape([one(i) for i in range(15)], shape)
    np.testing.assert_allclose(ours.drawn(name, shape, False, jnp.float32), want, atol=1e-8)
    np.testing.assert_allclose(ours.drawn(name, shape, True, jnp.float32), want.T, atol=1e-8)
    many = np.asarray(ours.drawn(name, (1000, 100), False, jnp.float32))
    assert abs(many.mean()) < 2e-4 and abs(many.std() - 0.02) < 1e-4
    assert (kind("a.norm.weight", 1), kind("a.bias", 1), kind("a.weight", 2)) == ("ones", "drawn", "drawn")


def test_a_block_is_many_calls_of_a_short_step() -> None:
    waited: list[int] = []
    calls: list[int] = []
    found = timed(lambda: calls.append(0) or len(calls), lambda out: waited.append(out), blocks=3, steps_per_call=2)  # type: ignore[func-returns-value]
    assert found["steps a block"] == 2 * 64 and len(calls) == 1 + 3 * 64  # more would not make it 40 ms
    assert waited == [1, 65, 129, 193] and found["low"] <= found["ms"] <= found["high"]


def test_a_block_is_four_calls_of_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call() -> None:
        clock[0] += 1.0

    monkeypatch.setattr(shared.time, "perf_counter", lambda: clock[0])
    found = timed(call, lambda _: None, blocks=3)
    assert (found["steps a block"], found["ms"], clock[0]) == (4, 1000.0, 13.0)


def test_a_row_has_the_best_of_each_side_and_says_when_the_losses_differ() -> None:
    lines = [line("PEFT", "limit", 2.0), line("PEFT", "eager", 10.0), line("PEFT", "layers", 6.0),
             {"row": "tiny", "side": "PEFT", "how": "model", "error": "no compiler"}, line("lorajax", "", 4.0)]
    row = speed.summary("tiny", ROWS["tiny"], lines)
    assert row["PEFT / lorajax"] == "1.50" and row["limit / lorajax"] == "0.50" and row["tokens/s"] == "8,000"
    assert row["PEFT best, ms"] == "6.00 (6.00 to 6.00) layers" and row["first loss and gradient"] == "agree"
    lines[1] = line("PEFT", "eager", 10.0, loss=4.4)
    assert speed.summary("tiny", ROWS["tiny"], lines)["first loss and gradient"].startswith("DIFFER by 1.0e-01")
    alone = speed.summary("tiny", ROWS["tiny"], lines[-1:])
    assert alone["PEFT best, ms"] == alone["PEFT / lorajax"] == alone["first loss and gradient"] == "-"
    assert "| tiny: tiny, 2 x 16 |" in speed.text(["smoke"], ["tiny"], lines) and "date today" in speed.text(
        ["smoke"], ["tiny"], lines)  # fmt: skip


def test_the_profile_is_that_of_the_best_way() -> None:
    parts = {how: {"kinds": {"products": ms}, "idle": 0.5} for how, ms in (("", 7.0), ("/scan", 6.0))}
    lines = [x for how, ms in (("", 9.0), ("/scan", 8.0)) for x in (
        line("lorajax", how, ms), {"row": "tiny", "side": "lorajax", "how": how, "profile": parts[how]})]  # fmt: skip
    found = speed.text(["smoke"], ["tiny"], lines)
    assert "- tiny: products 6.00, idle 0.50" in found and "7.00" not in found
    assert "idle 0.50" not in speed.text(["smoke"], ["tiny"], lines[:-1])  # the best way has none


def test_idle_is_what_no_kernel_covers() -> None:
    found = [("b", 5.0, 6.0), ("a", 0.0, 2.0), ("c", 1.0, 4.0), ("d", 5.5, 5.7), ("e", 9.0, 10.0)]
    assert kernels.idle(found) == (5.0 - 4.0) + (9.0 - 6.0)
    kinds = {name: next(kind for kind, regex in kernels.KINDS.items() if re.search(regex, name))
             for name in ("nvjet_tst_256x128_64x4_NT", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16",
                          "void cutlass::Kernel2<cutlass_80_wmma>", "MemcpyD2D", "input_transpose_fusion")}
    assert list(kinds.values()) == ["products", "attention", "products", "copies", "copies"]


def test_every_row_of_a_table_is_there_once() -> None:
    assert len(ROWS) == sum(map(len, TABLES.values()))
    for work in ROWS.values():
        assert all(how in ("limit", "eager", "amp", "layers", "model", "graphs") for how in work.theirs)


def test_the_command_goes_on_where_it_was_and_writes_the_document(tmp_path: Path, capsys: Any) -> None:
    """Everything is in the file: nothing is started, the tables are written. An unknown row is an error that says
    which there are."""
    file, document = tmp_path / "speed.json", tmp_path / "README.md"
    lines = [line("PEFT", how, 5.0) for how in ROWS["tiny"].theirs] + [line("lorajax", "", 4.0)]
    file.with_suffix(".lines").write_text("".join(json.dumps(x) + "\n" for x in lines))
    document.write_text("<!-- results:speed -->\nold\n<!-- /results:speed -->\n")
    speed.main(["smoke", "--rows", "tiny", "--json", str(file), "--into", str(document)])
    assert json.loads(file.read_text())["rows"] == lines
    assert "1.25" in document.read_text() and "old" not in document.read_text()
    with pytest.raises(SystemExit, match="no row 'tinny' in these tables, which have tiny, tiny_dora"):
        speed.main(["smoke", "--rows", "tinny"])


def test_scanned_layers_have_the_weights_of_the_others() -> None:
    one, many = (ours.measure(ROWS["tiny"], how, blocks=1)[0] for how in ("", "/scan"))
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(many["grad_norm"], one["grad_norm"], rtol=1e-4)
    assert many["trained"] == one["trained"]


@pytest.mark.parametrize("row", ["tiny_nf4", "tiny_bert"])
def test_our_side_needs_no_pytorch(row: str, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    for how in ROWS[row].ours:
        found, profile = ours.measure(ROWS[row], how, blocks=1)
        file.write_text(json.dumps(found))
        assert found["ms"] > 0 and found["step GiB"] > 0 and found["losses"][0] > found["losses"][2]
    kinds = profile()["kinds"]  # of the last way: XLA's own operations on a CPU
    assert kinds["products"] > 0 and kinds["fused"] > 0 and "attention" not in kinds


@pytest.mark.peft
@pytest.mark.parametrize(("row", "how"), [
    ("tiny", ""), ("tiny_dora", ""), ("tiny_dora", "/scan"), ("tiny_full", ""), ("tiny_bert", ":2")])  # fmt: skip
def test_both_sides_compute_the_same(row: str, how: str) -> None:
    """Three losses, the norm of the first gradient and the number of trained parameters, from the same weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    torch.set_num_threads(1)
    from experiments.bench import theirs

    mine, _ = ours.measure(ROWS[row], how, blocks=1)
    peft = theirs.measure(theirs.prepare(ROWS[row], "eager", "cpu"), "eager", blocks=1)
    np.testing.assert_allclose(mine["losses"], peft["losses"], rtol=1e-5)
    np.testing.assert_allclose(mine["grad_norm"], peft["grad_norm"], rtol=1e-4)
    assert mine["trained"] == peft["trained"]
    assert mine["losses"][0] - mine["losses"][2] > 1e-4  # they learn


@pytest.mark.peft
def test_both_sides_read_a_checkpoint(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    torch.set_num_threads(1)
    from safetensors.torch import save_file

    from experiments.bench import theirs

    work, file = ROWS["tiny_bert"], tmp_path / "model.safetensors"
    torch.manual_seed(0)
    encoder = theirs.build(work, "eager", "cpu").base_model.model.bert
    save_file({name.replace(".base_layer", ""): 0.3 * torch.randn(x.shape) + 0.1
               for name, x in encoder.state_dict().items() if "lora_" not in name}, file)  # fmt: skip
    mine, _ = ours.measure(work, "", 1, file)
    peft = theirs.prepare(work, "eager", "cpu", file)
    np.testing.assert_allclose(mine["losses"], peft.start["losses"], rtol=1e-5)
    assert abs(mine["losses"][0] - ours.measure(work, "", 1)[0]["losses"][0]) > 1e-4  # not those drawn
    assert ROWS["minilm"].checkpoint(tmp_path) == file and ROWS["bert"].checkpoint(tmp_path) is None


@pytest.mark.peft
def test_the_limit_counts_the_products_of_a_layer() -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    from experiments.bench.limit import products

    sizes = products(ROWS["lora_all"])
    assert sum(a * b for a, b in sizes) == 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
    assert sum(a * b for a, b in products(ROWS["bert"])) == 768 * (4 * 768 + 2 * 3072)
    index = np.arange(4, dtype=np.uint32)
    np.testing.assert_allclose(drawn(index, np.uint32(seed("a")), np.float32, np.uint32),
                               ours.drawn("a", (4,), False, jnp.float32), atol=1e-8)  # fmt: skip


@pytest.mark.slow
@pytest.mark.peft
def test_whole_fine_tunings_end_with_a_score(tmp_path: Path) -> None:
    """Both commands on toy files: three rows, times over the first's, accuracies of 20 examples."""
    pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    import torch_models
    from tiny import WORDS, glue_folder, model_folder

    from experiments.bench import end_to_end

    theirs = torch_models.build(
        "AutoModelForSequenceClassification", "bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, vocab_size=len(WORDS), max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "model")
    words = model_folder(tmp_path / "words") / "tokenizer.json"
    (tmp_path / "model" / "tokenizer.json").write_bytes(words.read_bytes())
    rows = end_to_end.main([
        "--model", str(tmp_path / "model"), "--data", str(glue_folder(tmp_path / "data", train=60, validation=20)),
        "--epochs=1", "--json", str(tmp_path / "found.json")])  # fmt: skip
    assert [row["what"] for row in rows] == [
        "lorajax, first run", "HF Trainer + PEFT", "lorajax, again, compiled before"]
    assert [row["PEFT over it"] for row in rows] == [rows[1]["seconds"] / row["seconds"] for row in rows]
    assert all(0 < row["loop s"] < row["seconds"] for row in rows)
    assert [row["steps"] for row in rows] == [2, 2, 2]  # 60 examples in batches of 32, on both sides
    assert all(0 < row["start s"] < row["seconds"] and 0 <= row["compiling s"] < row["loop s"] for row in rows[::2])
    assert all(0 <= row["waited %"] < 100 and 0 < row["evaluation %"] < 100 and 0 < row["padding %"] < 100
               for row in (rows[0], rows[2]))  # fmt: skip
    assert all(row["seconds"] > 0 and row["accuracy"] * 20 == pytest.approx(round(row["accuracy"] * 20))
               for row in rows)  # fmt: skip
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 3
