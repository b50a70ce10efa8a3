"""The benchmarks' counts: FLOPs near the ideal, and identical jitted layers that stay shared. No times."""

import pytest

from experiments.bench import flops, setting, trace


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
