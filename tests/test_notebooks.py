"""The notebooks run from top to bottom, as scripts in their smoke form, and are notebooks."""

import re
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["01_one_matrix", "02_compare_variants", "03_adalora_budget", "04_dylora_ranks", "05_your_own_variant",
         "06_any_model"]  # fmt: skip
ALL = [*NAMES, "07_compose"]  # test_compose_runs.py runs that one


def test_all_are_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == ALL


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.setenv("LORAJAX_SMOKE", "1")
    monkeypatch.delenv("LORAJAX_STUDY", raising=False)
    source = (FOLDER / f"{name}.py").read_text()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), matplotlib.rc_context():
        exec(compile(source, f"{name}.py", "exec"), {"__name__": name})
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", ALL)
def test_it_reads_as_cells(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    cells = re.split(r"^# %%", source, flags=re.MULTILINE)[1:]
    words = [cell for cell in cells if cell.startswith(" [markdown]")]
    assert words[0].splitlines()[1].startswith("# # ")
    assert len(words) >= len(cells) // 3
    for cell in words:
        assert all(line.startswith("#") for line in cell.splitlines()[1:] if line), cell
