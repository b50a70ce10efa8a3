"""The command line: typed arguments, dotted values, names of runs, and errors that say what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorajax import config

FILE = '''
from ml_collections import ConfigDict
from lorajax import config

def get_config(arg=None):
    args = config.arguments(arg, task="reviews", rank=8, ratio=1.0, smoke=False)
    return ConfigDict(dict(args=args, seed=0, lr=1e-3 if args.task == "reviews" else 5e-4, steps=100, data="",
                           betas=(0.9, 0.999), controller=dict(gamma=0.1, t_initial=5)))
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "adalora.py"
    path.write_text(FILE)
    return str(path)


def test_arguments_take_the_type_of_their_defaults():
    args = config.arguments("task=rte,rank=4,ratio=2,smoke", task="reviews", rank=8, ratio=1.0, smoke=False, other=3)
    assert args.to_dict() == {"task": "rte", "rank": 4, "ratio": 2.0, "smoke": True, "other": 3}
    assert [type(x) for x in (args.rank, args.ratio, args.smoke)] == [int, float, bool]
    assert config.arguments(None, rank=8).rank == 8
    assert config.arguments("smoke=false", smoke=True).smoke is False


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("rnak=4", ["'rnak'", "did you mean 'rank'?", "task, rank, smoke"]),
        ("rank=big", ["rank='big'", "int", "8"]),
        ("rank=4.5", ["rank='4.5'", "int"]),
        ("task", ["'task' has no value", "task=reviews"]),
        ("smoke=maybe", ["smoke='maybe'", "bool"]),
    ],
)
def test_argument_errors(arg, words):
    with pytest.raises(config.ConfigError) as error:
        config.arguments(arg, task="reviews", rank=8, smoke=False)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_flags_are_typed_by_the_value_that_is_there(file):
    launch = config.parse(
        ["--config", f"{file}:rank=4", "--config.lr=2e-3", "--config.steps", "7", "--config.controller.gamma=1",
         "--config.betas=0.8,0.95", "--config.data=/some/where", "--workdir=out", "--no-resume"],
        workdir="runs", resume=True)  # fmt: skip
    c = launch.config
    assert (c.lr, c.steps, c.controller.gamma, tuple(c.betas), c.data) == (2e-3, 7, 1.0, (0.8, 0.95), "/some/where")
    assert type(c.controller.gamma) is float
    assert c.args.rank == 4
    assert launch.options == {"workdir": "out", "resume": False}
    assert config.parse([f"--config={file}", "--resume"], workdir="runs", resume=False).options["resume"] is True
    json.dumps(config.to_dict(c))
    assert config.to_dict(c)["controller"] == {"gamma": 1.0, "t_initial": 5}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.learning=1"], ["--config.learning", "There are:", "lr"]),
        (["--config.contoller.gamma=1"], ["did you mean 'controller.gamma'?"]),
        (["--config.gamma=1"], ["did you mean 'controller.gamma'?"]),
        (["--config.stpes=1"], ["did you mean 'steps'?"]),
        (["--config.steps=1.5"], ["--config.steps='1.5'", "int", "100"]),
        (["--config.args.rank=2"], ["structure", ":rank=2"]),
        (["--workdri=x"], ["--workdri", "did you mean '--workdir'?"]),
        (["--workdir"], ["--workdir has no value"]),
        (["stray"], ["'stray'", "--name=value"]),
    ],
)
def test_flag_errors(file, words, said):
    with pytest.raises(config.ConfigError) as error:
        config.parse([f"--config={file}", *words], workdir="runs", resume=True)
    assert all(word in str(error.value) for word in said), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--config=configs/lora.py", "--help"]])
def test_help_is_the_scripts_docstring(words, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "How it is used.")
    with pytest.raises(SystemExit) as ended:
        config.parse(words, workdir="runs")
    assert ended.value.code == 0
    assert capsys.readouterr().out == "How it is used.\n"


def test_a_config_of_another_script():
    config.needs(config.load("configs/lora.py"), "lr", "configs/lora.py")
    for other in ("configs/plan.py", "configs/studies/targets.py"):
        with pytest.raises(config.ConfigError, match="no 'lr', so it is another script's: .* such as configs/lora.py"):
            config.needs(config.load(other), "lr", "configs/lora.py")


def test_file_errors(file):
    with pytest.raises(config.ConfigError, match=r"no config file .*adalroa.py.*did you mean .*adalora.py"):
        config.load(file.replace("adalora", "adalroa") + ":rank=4")
    with pytest.raises(config.ConfigError, match=r"no config given: add --config configs/NAME\.py"):
        config.parse([], workdir="runs")
    Path(file).with_name("empty.py").write_text("x = 1\n")
    with pytest.raises(config.ConfigError, match="has no get_config"):
        config.load(str(Path(file).with_name("empty.py")))


def test_choose_names_the_nearest():
    assert config.choose("task", "rte", {"rte": 1}) == 1
    with pytest.raises(config.ConfigError, match=r"unknown task 'sts2': did you mean 'sst2'\? There are: rte, sst2"):
        config.choose("task", "sts2", {"rte": 1, "sst2": 2})
    with pytest.raises(config.ConfigError, match=r"unknown task 'zzzzz'\. There are: rte"):
        config.choose("task", "zzzzz", {"rte": 1})


@pytest.mark.parametrize(
    ("arg", "words", "name"),
    [
        ("", [], "adalora"),
        (":rank=8,task=reviews", ["--config.lr=0.001"], "adalora"),  # all of it is there already
        (":task=rte", [], "adalora,task=rte"),  # what follows from the task is not said again
        (":rank=4", ["--config.steps=5", "--config.lr=2e-3"], "adalora,rank=4,lr=0.002,steps=5"),
        (":rank=4", ["--config.lr=2e-3", "--config.steps=5"], "adalora,rank=4,lr=0.002,steps=5"),
        ("", ["--config.seed=3"], "adalora"),  # the seed has a folder of its own
        ("", ["--config.data=/a b/c"], "adalora,data=-a-b-c"),
        ("", ["--config.betas=.8,.9", "--config.controller.gamma=1"], "adalora,betas=0.8+0.9,controller.gamma=1.0"),
    ],
)
def test_run_names(file, arg, words, name):
    assert config.parse([f"--config={file}{arg}", *words]).name == name


def test_a_long_run_name_stays_unique_and_fits_a_folder(file):
    one, two = (config.parse([f"--config={file}", f"--config.data={'x' * 300}{i}"]).name for i in range(2))
    assert len(one) == len(two) == 120
    assert one != two
    assert one[:110] == two[:110]


def test_the_config_is_locked(file):
    with pytest.raises(AttributeError):
        config.parse([f"--config={file}"]).config.new_key = 1


CONFIGS = sorted({path.stem for path in Path("configs").glob("*.py")} - {"__init__", "base"})
METHODS = [name for name in CONFIGS if config.load(f"configs/{name}.py").study == "glue"]
RUNS = [name for name in CONFIGS if "smoke" in config.load(f"configs/{name}.py").args]  # plan.py trains nothing


@pytest.mark.parametrize(
    ("name", "arg"),
    [*[(name, "") for name in CONFIGS], *[(name, ":smoke") for name in RUNS],
     *[(name, arg) for arg in (":task=rte", ":task=sst2,model=roberta-base") for name in METHODS]],
)  # fmt: skip
def test_shipped_configs_load(name, arg):
    c = config.load(f"configs/{name}.py{arg}")
    assert c.args.get("smoke", False) == (arg == ":smoke")
    default = config.load(f"configs/{name}.py")
    assert set(config.flatten(c)) == set(config.flatten(default)), "every argument gives the same keys"
    json.dumps(config.to_dict(c))


def test_the_methods_values_can_be_set_too():
    words = ["--config=configs/adalora.py", "--config.variant.alpha=4", "--config.controller.beta1=0.5"]
    c = config.parse(words).config
    assert (c.variant.alpha, c.controller.beta1) == (4.0, 0.5)


def test_config_needs_neither_jax_nor_flax():
    """The side floor: stdlib and ml_collections."""
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('c', 'lorajax/config.py'); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
