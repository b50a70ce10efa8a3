"""`experiments.storage` on two finished runs: what is stored, scores of the runs, and that the student learns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_glue import files, folder, own_cache, words  # noqa: F401  (fixtures)

from experiments import glue, storage
from experiments.compose import load_run


def test_storage_against_score(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    runs = []
    for task in ("stsb", "sst2"):
        more = ("--config.epochs=1", "--config.probe=false")
        glue.main(words(files, tmp_path / task, "lora", ",rank=4,targets=qv", *more, task=task))
        runs.append(folder(tmp_path / task))
    capsys.readouterr()
    file = tmp_path / "storage.json"
    said = storage.main([*map(str, runs), "--rank=4", "--steps=12", "--rows=4", "--length=16", "--lr=1e-2",
                         f"--json={file}"])
    found = json.loads(file.read_text())
    sites, width, tasks = 4, 16, 2  # query and value of two layers
    matrix = 4 * width * sites
    assert [row["parameters"] for row in found.values()] == [
        tasks * 2 * matrix, tasks * 2 * matrix // 4, matrix + tasks * matrix, matrix + tasks * matrix,
        2 * matrix + tasks * 2 * matrix // 4, 4 * matrix, 4 * matrix]
    assert list(found)[1] == "apart, rank 1" and list(found)[-1] == "one for all, rank 8, distilled"
    own = found["apart"]
    for run in map(load_run, runs):  # scored on the wide model as on the run's own
        np.testing.assert_allclose(own["scores"][run.task.name], run.own_score, atol=1e-4)
    assert own["errors"] == [0, 0] and 0 < max(found["apart, rank 1"]["errors"]) < 1
    assert max(found["one A of rank 4"]["errors"]) < max(found["common of rank 4, own of 1"]["errors"])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert max(losses) < 20  # no task has a class of another as one of its own that never wins
    taught = losses[len(losses) // 2:]
    assert taught[-1] < taught[0]
    assert said.splitlines()[0].split() == "stored as parameters part error worst score worst".split()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no finished run"):
        storage.main([str(tmp_path)])
