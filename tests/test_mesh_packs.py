"""Packed runs along the mesh axis `trial`, also over two processes: each leaves what it leaves on one device."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_mesh_runs import files, own_cache  # noqa: F401
from test_processes import start

from experiments import programs, sweep

STUDY = '''
from ml_collections import ConfigDict
from lorajax.sweep import each, fixed, product, zipit

def get_config(arg=None):
    where = fixed(**{{"config": "lora", "arg.task": "sst2", "arg.model": "{0}", "arg.targets": "qv", "data": "{1}",
                     "max_length": 16, "batch": 8, "eval_batch": 16, "log_every": 1, "shapes": 1,
                     "dropout": 0.1, "probe": False, "compute_dtype": "float32"}})
    runs = zipit(each("arg.rank", [2, 3, 2]), each("lr", [1e-2, 3e-2, 1e-3]), each("seed", [0, 1, 2]),
                 each("epochs", [1.0, 0.5, 1.0]))
    return ConfigDict({{"trials": product(where, runs)}})
'''


@pytest.fixture(scope="module")
def study(files: Any, tmp_path_factory: Any) -> Any:  # noqa: F811
    path = tmp_path_factory.mktemp("study") / "study.py"
    path.write_text(STUDY.format(*files))
    sweep.main([f"--config={path}", f"--workdir={path.parent / 'one'}"])
    return path


def same(one: Path, other: Path) -> None:
    summaries = sorted(one.rglob("summary.json"))
    assert len(summaries) == 3
    for summary in summaries:
        mine = other / summary.relative_to(one)
        a, b = (json.loads(file.read_text()) for file in (summary, mine))
        assert {k: a[k] for k in ("scores", "best_step", "name", "steps")} == {k: b[k] for k in ("scores", "best_step",
                                                                                                 "name", "steps")}
        assert b["packed_with"] == 2
        lines = ((s.parent / "metrics.jsonl").read_text().splitlines() for s in (summary, mine))
        for x, y in zip(*lines, strict=True):
            np.testing.assert_allclose(list(json.loads(x).values()), list(json.loads(y).values()), rtol=1e-5)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (mine.parent / "adapter" / name).exists()


def test_runs_along_trial_are_those_of_one_device(study: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Three runs on four places, and each pair of devices has a run of its own: nothing moves between runs."""
    made = []
    real = programs.make_packed_step

    class Seen:
        def __init__(self, jitted: Any):
            self.jitted, self.lower = jitted, jitted.lower

        def __call__(self, *args: Any) -> Any:
            if not made:
                made.append(self.lower(*args).compile().as_text())
                made.append({x.sharding.spec[0] for x in jax.tree.leaves(args[0])})
            return self.jitted(*args)

    def kept(*args: Any, **how: Any) -> Any:
        step = real(*args, **how)
        step.jitted = Seen(step.jitted)  # type: ignore[attr-defined]
        return step

    monkeypatch.setattr(programs, "make_packed_step", kept)
    pairs = tmp_path / "pairs.py"
    pairs.write_text(study.read_text().replace('"probe": False', '"probe": False, "mesh.data": 2'))
    sweep.main([f"--config={pairs}", f"--workdir={tmp_path}", "--trial=4"])
    same(study.parent / "one", tmp_path)
    assert made[1] == {"trial"}
    groups = set(re.findall(r" all-reduce\([^\n]*replica_groups=(\{\{[\d,]+|\[[\d,]+\])", made[0]))
    assert groups in ({"{{0,1"}, {"[4,2]"})  # gradients, over `data`
    gathered = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)\(", made[0])
    assert all(np.prod([int(n) for n in re.findall(r"\d+", shape.split("[")[1].split("]")[0])] or [1]) <= 4
               for shape in gathered), gathered  # the metrics of the four runs


@pytest.mark.slow
def test_two_processes_train_one_pack(study: Path, tmp_path: Path) -> None:
    codes, outs = start(2, f"--config={study}", f"--workdir={tmp_path}", "--trial=-1", devices=2,
                        program=("-m", "experiments.sweep"))  # fmt: skip
    assert codes == [0, 0], outs
    same(study.parent / "one", tmp_path)
