"""The run folder: what a killed and resumed run leaves behind, who may write, and what a resume refuses."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from lorajax.shard import hosts
from lorajax.train.progress import Progress
from lorajax.train.run import EXIT_INTERRUPTED, Run, RunError, environment, run_folder, stop_on_signal, write_json

ROOT = Path(__file__).parents[1]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """[(step, tag, value)] of every tensorboard file, read by the TFRecord framing (length, crc, event, crc)."""
    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def test_layout_and_contents(tmp_path):
    folder = run_folder(tmp_path, "glue", "lora:rank=8", 3)
    assert folder == tmp_path / "glue" / "lora:rank=8" / "seed=3"
    with Run(folder, {"rank": 8, "model": {"name": "tiny"}}, fingerprints={"base": "ab12"}) as run:
        assert not run.resumed
        run.rewind(0)
        run.log(1, {"loss": jnp.float32(0.1), "finite": jnp.bool_(True), "n": np.int64(4)})
        run.log(2, {"loss": float("nan"), "task": "rte"})
        run.log(2, {"accuracy": 0.5}, prefix="eval/")
        run.log_time(2, {"examples_per_second": 12.5})
        assert not run.finished
        run.finish({"accuracy": 0.5})
        assert run.finished
    config = json.loads((folder / "config.json").read_text())
    assert config["config"] == {"rank": 8, "model": {"name": "tiny"}}
    assert config["fingerprints"] == {"base": "ab12"}
    assert config["versions"]["jax"] == jax.__version__
    assert config["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert rows(folder) == [
        {"step": 1, "loss": float(np.float32(0.1)), "finite": True, "n": 4},
        {"step": 2, "loss": None, "task": "rte"},
        {"step": 2, "eval/accuracy": 0.5},
    ]
    assert json.loads((folder / "timing.jsonl").read_text()) == {"step": 2, "examples_per_second": 12.5}
    assert json.loads((folder / "summary.json").read_text()) == {"accuracy": 0.5}
    assert (2, "eval/accuracy", 0.5) in events(folder)
    assert (2, "time/examples_per_second", 12.5) in events(folder)


@pytest.mark.parametrize("part", ["", "..", "a/b"])
def test_a_name_is_one_folder(tmp_path, part):
    with pytest.raises(ValueError, match="cannot be the name of one folder"):
        run_folder(tmp_path, "glue", part, 0)


def test_rewind_cuts_behind_the_checkpoint_and_a_torn_line(tmp_path):
    with Run(tmp_path, {}, tensorboard=False) as run:
        for step in range(1, 6):
            run.log(step, {"loss": 1.0 / step})
            run.log(step, {"accuracy": step / 10}, prefix="eval/")
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')
    with Run(tmp_path, {}, tensorboard=False) as run:
        assert run.resumed
        run.rewind(3)
        assert [row["step"] for row in rows(tmp_path)] == [1, 1, 2, 2, 3, 3]
        with pytest.raises(ValueError, match=r"metrics of step 2 after those of step 3: rewind\(2\)"):
            run.log(2, {})
        for step in (4, 5):
            run.log(step, {"loss": 1.0 / step})
            run.log(step, {"accuracy": step / 10}, prefix="eval/")
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    with Run(tmp_path, {}, tensorboard=False) as run:
        run.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_resume_with_other_settings_names_them(tmp_path):
    config = {"rank": 8, "optimizer": {"rate": 0.1, "betas": (0.9, 0.999)}, "log_every": 10}
    with Run(tmp_path, config, fingerprints={"data": "aa"}, ignore=["log_every"], tensorboard=False):
        pass
    same = {**config, "log_every": 99}
    with Run(tmp_path, same, fingerprints={"data": "aa"}, ignore=["log_every"], tensorboard=False) as run:
        assert run.changed == []
    other = {**config, "optimizer": {"rate": 0.2, "betas": (0.9, 0.999)}}
    with pytest.raises(RunError, match=r"(?s)\s+config\.optimizer\.rate: 0\.1 then, 0\.2 now.*or start a new"):
        Run(tmp_path, other, fingerprints={"data": "aa"}, tensorboard=False)
    with pytest.raises(RunError, match=r"fingerprints\.data: 'aa' then, 'bb' now"):
        Run(tmp_path, config, fingerprints={"data": "bb"}, tensorboard=False)
    with pytest.raises(RunError, match=r"config\.dora: 'absent' then, True now"):
        Run(tmp_path, {**config, "dora": True}, fingerprints={"data": "aa"}, tensorboard=False)
    with Run(tmp_path, other, fresh=True, tensorboard=False) as run:  # the failed ones let go of the lock
        assert not run.resumed


def test_another_version_is_told_but_allowed(tmp_path):
    with Run(tmp_path, {}, tensorboard=False):
        pass
    record = json.loads((tmp_path / "config.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    write_json(tmp_path / "config.json", record)
    with Run(tmp_path, {}, tensorboard=False) as run:
        assert run.changed == [f"versions.jax: '0.0.1' then, '{jax.__version__}' now"]


def test_fresh_forgets_the_run_and_nothing_else(tmp_path):
    with Run(tmp_path, {"a": 1}) as run:
        run.log(1, {"loss": 1.0})
        run.finish({})
        run.checkpoints.mkdir()
        (run.checkpoints / "x").touch()
        (tmp_path / "notes.txt").touch()
    with Run(tmp_path, {"a": 2}, fresh=True) as run:
        assert not run.resumed
        assert not run.finished
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {".lock", "config.json", "metrics.jsonl", "timing.jsonl", "notes.txt"}


def test_one_writer_at_a_time(tmp_path):
    with Run(tmp_path, {}, tensorboard=False):
        with pytest.raises(RunError, match=rf"in use by process {os.getpid()}: wait for it, or choose another folder"):
            Run(tmp_path, {}, tensorboard=False)
    with Run(tmp_path, {}, tensorboard=False):
        pass


def test_a_config_that_is_no_json_is_an_error_with_a_way_out(tmp_path):
    (tmp_path / "config.json").write_text('{"config": ')
    with pytest.raises(RunError, match=r"config.json is no whole JSON .*--no-resume"):
        Run(tmp_path, {}, tensorboard=False)
    with Run(tmp_path, {}, tensorboard=False, fresh=True):
        pass


def test_processes_agree_on_whether_the_folder_is_open(tmp_path, monkeypatch):
    """Where process 0 is refused, the others hear of it and wait for nothing."""
    told = []
    monkeypatch.setattr(hosts, "agreed", lambda value: told.append(bool(value)) or value)
    with Run(tmp_path, {"a": 1}), pytest.raises(RunError, match="in use"):
        Run(tmp_path, {"a": 1})
    with pytest.raises(RunError, match="other settings"):
        Run(tmp_path, {"a": 2})
    assert told == [True, False, False]
    monkeypatch.setattr(hosts, "writes", lambda: False)
    Run(tmp_path, {"a": 1})
    monkeypatch.setattr(hosts, "agreed", lambda value: False)  # what process 0 answers
    with pytest.raises(RunError, match="process 0 could not open"):
        Run(tmp_path, {"a": 1})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_git_revision_is_that_of_this_repository():
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    revision = environment()["git"]
    if head.returncode:
        assert revision is None
    else:
        assert revision.removesuffix("-dirty") == head.stdout.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == signal.Signals(number).name
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


LOOP = '''
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np, optax
from lorajax.train.checkpoint import Checkpoints
from lorajax.train.run import EXIT_INTERRUPTED, Run, stop_on_signal
from lorajax.train.step import init_state, make_step

folder, where, when = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Adapt:
    def bind(self, trainable, frozen, *, key=None, masks=None):
        keep = jax.random.bernoulli(key, 0.5, (4,)).astype(jnp.float32)
        return {"w": frozen + keep[:, None] * trainable}
    def penalty(self, trainable):
        return 0.0

def loss(bound, batch, key):
    return jnp.mean((batch["x"] @ bound["w"] - batch["y"]) ** 2), {}

def die(place, step):
    if (place, step) == (where, when):
        os.kill(os.getpid(), signal.SIGTERM if place == "term" else signal.SIGKILL)

tx = optax.adam(0.1)
state = init_state(jax.random.key(1), jnp.zeros((4, 2)), tx)
step = make_step(loss, Adapt(), tx)
rng = np.random.default_rng(0)
data = [{"x": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "y": jnp.ones((8, 2))} for _ in range(12)]
with Run(folder, {"steps": 12}) as run, Checkpoints(run.checkpoints) as checkpoints, stop_on_signal() as stop:
    begin, best = 0, None
    if checkpoints.latest() is not None:
        state, position = checkpoints.restore(state)
        begin, best = position["batch"], position["best"]
    run.rewind(begin)
    for n in range(begin, 12):
        state, metrics = step(state, jnp.ones((4, 2)), data[n])
        die("step", n + 1)
        run.log(n + 1, metrics)
        die("log", n + 1)
        die("term", n + 1)
        if (n + 1) % 3 == 0 or stop:
            score = float(metrics["loss"])
            better = best is None or score < best["loss"]
            best = {"step": n + 1, "loss": score} if better and (n + 1) % 3 == 0 else best
            checkpoints.save(n + 1, state, {"batch": n + 1, "best": best}, best=better and (n + 1) % 3 == 0)
            die("save", n + 1)
        if stop:
            checkpoints.wait()
            sys.exit(EXIT_INTERRUPTED)
    checkpoints.wait()
    die("end", 12)
    run.finish({"best": best, "bytes": np.asarray(state.trainable).tobytes().hex()})
'''


def train(folder, where="never", when=0):
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", LOOP, str(folder), where, str(when)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL, EXIT_INTERRUPTED), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(folder) == 0
    assert len(rows(folder)) == 12
    return folder


@pytest.mark.parametrize(
    ("kills", "code"),
    [
        ([("step", 1), ("save", 3), ("log", 6)], -signal.SIGKILL),
        ([("step", 8)], -signal.SIGKILL),
        ([("save", 12), ("end", 12)], -signal.SIGKILL),
        ([("term", 5)], EXIT_INTERRUPTED),
    ],
)
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, uninterrupted, kills, code):
    for where, when in kills:
        assert train(tmp_path, where, when) == code
        assert not (tmp_path / "summary.json").exists()
    assert train(tmp_path) == 0
    for name in ("metrics.jsonl", "summary.json"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_now_and_then():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, done=40, every=30, stream=stream, clock=clock) as progress:
        for step in range(60):
            clock.now += 1.0
            progress.update(examples=jnp.float32(8), loss=jnp.float32(step / 2))
        progress.write("done")
    assert stream.getvalue().splitlines() == [
        "step 70/100 (70%), loss 14.5, 8.0 examples/s, 00:30 left",
        "step 100/100 (100%), loss 29.5, 8.0 examples/s, 00:00 left",
        "done",
    ]
    assert progress.examples_per_second == 8.0


def test_what_was_no_step_is_told_as_shares_of_the_time():
    stream, clock = io.StringIO(), Clock()

    def slow():
        for i in range(3):
            clock.now += 2.0  # to make a batch
            yield i

    with Progress(3, stream=stream, clock=clock) as progress:
        for i in progress.fed(slow()):
            clock.now += 10.0
            progress.update(examples=1, loss=jnp.array([7.0, i]))
        with progress.aside("evaluation"):
            clock.now += 4.0
    clock.now += 100.0  # what comes behind the loop does not count
    assert progress.shares() == {"data": pytest.approx(6 / 40), "evaluation": pytest.approx(0.1)}
    assert "loss 2," in stream.getvalue()


def test_on_a_terminal_a_bar():
    stream, clock = Terminal(), Clock()
    with Progress(10, stream=stream, clock=clock) as progress:
        for _ in range(10):
            clock.now += 1.0
            progress.update(examples=4, loss=0.25)
    assert "10/10" in stream.getvalue()
    assert "loss 0.25, 4.0 examples/s" in stream.getvalue()


def test_a_run_begins_without_what_it_needs_later_or_never():
    """Seconds before the first step: scores, plots and events are imported when they are asked for."""
    late = {"torch", "tensorboardX", "sklearn", "scipy", "pandas", "datasets", "pyarrow", "matplotlib", "transformers"}
    code = f"import sys, experiments.glue; print(sorted({late} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
