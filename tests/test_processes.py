"""Several processes with real collectives on the CPU: equal numbers, a preemption notice, a process that dies."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import process
import pytest
from tiny import glue_folder, model_folder

from lorajax.data.batches import bucket_lengths
from lorajax.data.text_scores import text_scores
from lorajax.optim.recipe import warmup_schedule
from lorajax.shard import hosts
from lorajax.shard.mesh import MeshError

TESTS = Path(__file__).parent


def start(count: int, *words: str, devices: int = 2, program: tuple[str, ...] = (str(TESTS / "process.py"),),
          gpus: bool = False) -> Any:
    """(exit codes, outputs) of `count` processes with `devices` each, forced ones or this machine's first GPUs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    kind = {"XLA_FLAGS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if gpus else {"XLA_FLAGS": flags,
                                                                                       "JAX_PLATFORMS": "cpu"}
    env = os.environ | kind | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
                               "JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # fmt: skip
    if count > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    which = [{"JAX_PROCESS_ID": str(i)} if count > 1 else {} for i in range(count)]
    if gpus:
        mine = [range(i * devices, (i + 1) * devices) for i in range(count)]
        which = [own | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, ids))} for own, ids in zip(which, mine, strict=True)]
    all_ = [subprocess.Popen([sys.executable, *program, *words], env=env | own, text=True, cwd=TESTS.parent,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for own in which]
    outs = [one.communicate(timeout=600)[0] for one in all_]
    return [one.returncode for one in all_], outs


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def close(one: Path, other: Path) -> None:
    for a, b in zip(rows(one), rows(other), strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    kept = [json.loads((folder / "summary.json").read_text())["kept"] for folder in (one, other)]
    assert kept[0] == kept[1]


def test_two_processes_take_a_notice_and_one_process_goes_on(tmp_path: Path) -> None:
    """The notice reaches process 1 alone; both save once, at one step; another mesh restores bit for bit (the program
    compares digests), and the whole run is that of one device."""
    process.train(tmp_path / "one", {})
    codes, outs = start(2, str(tmp_path / "two"), '{"fsdp": 2, "tensor": 2}', "1:2:SIGTERM")
    assert codes == [75, 75], outs
    assert outs[0].count("saved at ") == 1
    assert not (tmp_path / "two" / "summary.json").exists()
    process.train(tmp_path / "two", {"data": 4, "tensor": 2})
    close(tmp_path / "one", tmp_path / "two")


def killed(folder: Path, count: int, mesh: str, victim: int) -> None:
    whole = folder / "whole"
    codes, outs = start(count, str(whole), mesh)
    assert codes == [0] * count, outs
    codes, outs = start(count, str(folder / "cut"), mesh, f"{victim}:6:SIGKILL")
    for i, (code, out) in enumerate(zip(codes, outs, strict=True)):
        assert code == (-9 if i == victim else code)
        assert code != 0
        assert i == victim or "start all of them again" in out or "another task died" in out, out
    codes, outs = start(count, str(folder / "cut"), mesh)
    assert codes == [0] * count, outs
    assert "restored 4" in outs[0]
    assert (folder / "cut" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (folder / "cut" / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    process.train(folder / "one", {})
    close(folder / "one", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh", "victim"), [(2, '{"data": -1}', 1), (2, '{"fsdp": -1}', 0),
                                                       (4, '{"data": 2, "fsdp": 2, "tensor": 2}', 2)])  # fmt: skip
def test_a_killed_process_stops_all_and_the_same_command_goes_on(tmp_path: Path, count: int, mesh: str,
                                                                 victim: int) -> None:
    killed(tmp_path, count, mesh, victim)


@pytest.mark.slow
def test_the_main_experiment_in_two_processes(tmp_path: Path) -> None:
    """DyLoRA: its rank is drawn in the step, and it evaluates under masks."""
    model, glue = model_folder(tmp_path / "model"), glue_folder(tmp_path / "data")
    words = [f"--config=configs/dylora.py:task=sst2,model={model},rank=2,targets=qv", f"--config.data={glue}",
             "--config.max_length=16", "--config.batch=8", "--config.eval_batch=16", "--config.shapes=1",
             "--config.log_every=1", "--config.dropout=0.1", "--config.epochs=1", "--config.study=tiny",
             "--config.accumulate=2"]  # fmt: skip
    found = []
    for name, count, mesh in (("one", 1, []), ("two", 2, ["--config.mesh.data=2", "--config.mesh.fsdp=-1"])):
        codes, outs = start(count, *words, *mesh, f"--workdir={tmp_path / name}", program=("-m", "experiments.glue"))
        assert codes == [0] * count, outs
        assert "head on the frozen encoder" in outs[0]
        (folder,) = (tmp_path / name).glob("tiny/*/seed=*")
        found.append(folder)
    one, two = found
    for a, b in zip(rows(one), rows(two), strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    assert {path.name for path in one.iterdir()} >= {path.name for path in two.iterdir() if "events" not in path.name}
    assert len(list(two.glob("events.*"))) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [({"coordinator": "localhost:1"}, "processes, process is missing: give --processes"),
     ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "process=2 of processes=2: they count from 0 to 1"),
     ({"process": 1}, "coordinator, processes is missing")],
)  # fmt: skip
def test_what_is_missing_is_named(given: Any, words: str) -> None:
    with pytest.raises(MeshError, match=words):
        hosts.start(**given)
    hosts.start(processes=1)


def test_open_mpi_5_is_asked_through_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **how: asked.append(how))
    monkeypatch.setattr(hosts, "writes", lambda: True)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeshError, match="pip install mpi4py, which asks it, or give --coordinator"):
        hosts.start()
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: object())
    hosts.start()
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    hosts.start()
    assert [how.get("cluster_detection_method") for how in asked] == ["mpi4py", None]


def bad(words: list[str]) -> None:
    raise ValueError("not ours")


@pytest.mark.parametrize(
    ("main", "ends", "said"),
    [(lambda _: warmup_schedule(1.0, 10, decay="cosin"), SystemExit, "error: decay='cosin' .*did you mean 'cosine'"),
     (lambda _: bucket_lengths(np.ones(3, int), 1, 0), SystemExit, "error: batch_size=0: a batch has at least one"),
     (lambda _: text_scores(["a"], [["a"]]), SystemExit, "error: sacrebleu scores generated texts: pip install"),
     (lambda _: np.reshape(np.ones(3), (2, 2)), ValueError, "cannot reshape"),
     (bad, ValueError, "not ours")],
)  # fmt: skip
def test_what_our_code_says_of_bad_input_is_one_line(main: Any, ends: Any, said: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake inside JAX, NumPy or foreign code keeps its traceback."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ends, match=said):
        hosts.run(main, ())
