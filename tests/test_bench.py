"""The benchmarks' counts: FLOPs near the ideal, and identical jitted layers that stay shared. No times."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import glue_folder, model_folder

from experiments.bench import flops, methods, mixed, packing, padding, remat, scaling, serve, setting, start, trace


def test_flops_are_those_of_forward_activation_gradients_and_adapter_products() -> None:
    counts = flops.measure(layers=12, width=64, ffn=256, heads=4, batch=16, tokens=16)
    assert counts["lifted / ideal"] == pytest.approx(1.0, abs=0.05)
    assert counts["W + AB / ideal"] > 1.15  # the count sees a dense update where there is one
    assert counts["full / ideal"] > 1.15
    assert 1.0 < counts["DoRA / LoRA"] < 1.05


def test_identical_jitted_layers_stay_shared() -> None:
    few, many = trace.programs("jitted", 2), trace.programs("jitted", 8)
    assert trace.functions(many["lifted"]()) == trace.functions(few["lifted"]())
    # `one` is the layer: forward, linearised, transposed, as often as in the plain program.
    assert trace.functions(many["lifted"](), "one") == trace.functions(many["plain"](), "one") > 0


def test_markdown_table() -> None:
    table = setting.markdown([{"a": 1.23456, "b": "x"}], {"date": "today"})
    assert table.splitlines() == ["| a | b |", "|---|---|", "| 1.235 | x |", "", "date today"]
    assert {"date", "jax", "cpu", "cores", "device"} <= set(setting.setting())


def test_mixed_batches_are_timed_beside_the_base() -> None:
    """The three programs differ only in their adapters, and every row of the last has its own."""
    made = mixed.parts(mixed.SMOKE, adapters=3, rank=2, rows=4, tokens=5, dtype=jnp.float32)
    runs = mixed.programs(made, "apart")
    for program in runs:
        again = program["one per row"]()  # a step of decoding leaves its cache as it was
        np.testing.assert_array_equal(again, program["one per row"]())
        base, one, each = (np.asarray(jax.tree.leaves(run())[0]) for run in program.values())
        assert base.shape == one.shape == each.shape
        np.testing.assert_allclose(each[[0, 3]], one[[0, 3]], atol=1e-5)  # rows 0 and 3 have the first adapter
        assert np.abs(each - one)[1:3].max() > 1e-4 < np.abs(one - base).max()
    row = mixed.measure(runs[1], repeats=1)
    assert set(row) == {"base ms", "one adapter ms", "one per row ms", "one adapter / base", "one per row / base"}


def test_the_scaling_table_has_a_row_for_each_layout(capsys: Any, tmp_path: Path) -> None:
    """The harness alone, on forced host devices: one batch for every layout but `share`, whose rows are a device's."""
    kept = tmp_path / "scaling.json"
    scaling.main(["--runs", "tiny:one+share+fsdp", "--devices", "2", "--steps", "1", "--json", str(kept)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["layout"], row["batch"]) for row in rows] == [("one", 8), ("share", 4), ("fsdp 2", 8)]
    assert all(row["ms"] > 0 and row["waited"] > 0 for row in rows)
    one, share, fsdp = rows
    assert fsdp["speedup"] == pytest.approx(one["ms"] / fsdp["ms"]) == pytest.approx(2 * fsdp["efficiency"])
    assert fsdp["weak"] == pytest.approx(2 * share["ms"] / fsdp["ms"])
    assert fsdp["memory GiB"] < one["memory GiB"]
    assert json.loads(kept.read_text())["rows"] == rows
    assert kept.with_suffix(".md").read_text().count("tiny") == 3
    scaling.main(["--runs", "tiny:share:2", "--devices", "2", "--steps", "3", "--scan"])
    assert json.loads(capsys.readouterr().out.splitlines()[0])["steps a call"] == 2
    scaling.main(["--runs", "tiny:one:2", "--devices", "2", "--seconds", "-1", "--scan"])
    assert "tiny one:2: not measured, -1 s are over" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give model:layout"):
        scaling.main(["--runs", "tiny:two"])


def test_remat_and_methods_are_timed(tmp_path: Any, capsys: Any) -> None:
    """The harness alone: a row for each policy and method, as they come, and what `auto` takes here."""
    tiny = ["--shape", "tiny", "--batch", "2", "--tokens", "64", "--steps", "1"]
    rows = remat.main([*tiny, "--policies", "attention", "--json", str(tmp_path / "remat.json")])
    assert json.loads((tmp_path / "remat.json").read_text())["rows"] == rows
    assert rows[0]["ms"] > 0 and rows[0]["GiB"] > 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": attention")
    (row,) = methods.main([*tiny, "--cases", "dora"])
    assert row["over the first"] == 1.0 and row["ms"] > 0


def test_packed_runs_are_timed_beside_one(tmp_path: Path, capsys: Any) -> None:
    kept = tmp_path / "packing.json"
    toy = ["--rows", "tiny_bert", "--runs", "3", "--steps-per-call", "1", "--blocks", "1"]
    packing.main([*toy, "--how", "short", "--profile", "--json", str(kept)])
    profile = json.loads(capsys.readouterr().out.splitlines()[0])
    assert profile["how"] == "short" and profile["profile"]["kinds"]
    (row,) = json.loads(kept.read_text())["rows"]
    assert row["runs"] == 3
    assert row["losses differ by"] < 1e-5
    assert row["alone / packed"] == pytest.approx(row["alone, ms"] / row["packed, ms"])


def test_more_slots_take_fewer_steps(capsys: Any) -> None:
    """The harness alone: every token is counted, and no slot is idle where all texts have one length."""
    serve.main(["--smoke", "--slots", "1,3", "--adapters", "2"])
    one, three = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert (one["texts"], three["texts"], one["full"], three["full"]) == (3, 9, 1.0, 1.0)
    assert one["tokens/s"] > 0 and three["programs"] == 3  # a bucket, a step, a write


def test_padding_is_counted_by_lengths(tmp_path: Path) -> None:
    """The harness alone: what a run would print, for one length, four, as many as 5 % take, and calls."""
    words = ["--config", f"configs/lora.py:model={model_folder(tmp_path / 'model')}", "--steps-per-call", "2"]
    data = str(glue_folder(tmp_path / "data", train=640))
    (row,) = padding.main([*words, "--tasks", "sst2", "--data", data, "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == [row]
    assert row["examples"] == 640 and row["padding %"] == row["default %"] <= 5 < row["one length %"]
    assert row["default lengths"] == row["lengths"] and row["those %"] < row["in calls of any lengths %"]


@pytest.mark.slow
def test_a_command_is_started_twice(tmp_path: Path, capsys: Any) -> None:
    config = f"configs/lora.py:task=sst2,model={model_folder(tmp_path / 'model')},smoke"
    first, second = start.main([f"--config={config}", f"--config.data={glue_folder(tmp_path / 'data')}"])
    assert first["seconds"] > 0 and second["programs in the cache"] == first["programs in the cache"]
    assert "| start | seconds | programs in the cache |" in capsys.readouterr().out
