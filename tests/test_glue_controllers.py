"""The experiment with the controllers of DyLoRA, SoRA and sparse LoRA, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file
from tiny import glue_folder, model_folder

from experiments import glue


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Any:
    """(model, data); programs are cached there, and nothing is left in the user's cache."""
    root = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAJAX_CACHE", str(root / "cache"))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        before = jax.config.jax_compilation_cache_dir
        yield model_folder(root / "model"), glue_folder(root / "data")
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def run(files: Any, workdir: Path, name: str, *more: str) -> tuple[dict[str, Any], list[Any], dict[str, np.ndarray]]:
    """(summary, evaluations of the log, saved arrays of A, B and gates)"""
    model, data = files
    glue.main([
        f"--config=configs/{name}.py:task=sst2,model={model},rank=3,targets=qv", f"--config.data={data}",
        f"--workdir={workdir}", "--config.max_length=16", "--config.batch=8", "--config.shapes=1", "--config.epochs=2",
        "--config.dropout=0", "--config.lr=1e-2", "--config.study=tiny", "--config.probe=false", *more,
    ])  # fmt: skip
    (folder,) = Path(workdir).glob("tiny/*/seed=*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    arrays = {name: x for file in (folder / "adapter").glob("*.safetensors") for name, x in load_file(file).items()}
    adapters = {name: x for name, x in arrays.items() if "classifier" not in name}
    return json.loads((folder / "summary.json").read_text()), [r for r in rows if "eval/accuracy" in r], adapters


def test_dylora_prints_logs_and_keeps_the_score_at_every_rank(files: Any, tmp_path: Path, capsys: Any) -> None:
    summary, evaluations, _ = run(files, tmp_path, "dylora")
    out, progress = capsys.readouterr()
    names = ["rank_1", "rank_2", "rank_3"]
    assert list(summary["views"]) == names
    assert [row["step"] for row in evaluations] == [8, 16]
    (best,) = (row for row in evaluations if row["step"] == summary["best_step"])
    for name in names:
        assert progress.count(f"{name}: accuracy") == 2
        assert f"its {name} " in out
        assert summary["views"][name]["accuracy"] == best[f"eval/{name}/accuracy"]
    assert summary["views"]["rank_3"] == summary["scores"]


def test_sora_reports_the_ranks_that_are_left(files: Any, tmp_path: Path) -> None:
    schedule = ("levels=3", "max_threshold=9", "threshold=3", "first=0.4")
    summary, evaluations, arrays = run(files, tmp_path, "sora", *[f"--config.controller.{x}" for x in schedule])
    gates = [x for name, x in arrays.items() if name.endswith(".g")]
    assert len(gates) == 4
    assert summary["ranks_kept"] == sum(np.count_nonzero(g) for g in gates) < 12
    assert summary["best_step"] == 16  # the last threshold holds from step 11 on
    # The learning rate falls from 1e-2 at step 1 of 16 to 0; xi = rate * threshold, in the last step 9 * rate(15).
    assert evaluations[-1]["eval/threshold"] == pytest.approx(9 * 1e-2 / 15, rel=1e-4)


def test_sparse_lora_saves_as_few_numbers_as_it_says(files: Any, tmp_path: Path) -> None:
    summary, evaluations, arrays = run(files, tmp_path, "sparse", "--config.controller.density=0.06",
                                         "--config.controller.start=0.3")
    share = sum(np.count_nonzero(x) for x in arrays.values()) / sum(x.size for x in arrays.values())
    assert 0.05 < share <= 0.06
    assert summary["density"] == pytest.approx(share)
    assert {row["eval/density"] for row in evaluations} == {summary["density"]}
