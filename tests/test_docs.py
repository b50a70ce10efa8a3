"""The page on adding a variant: its code runs, fits in the lines it promises, and passes the conformance tests."""

import inspect
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import conformance
import jax
import pytest
import test_conformance

from lorajax import build, variants

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_variant.md"
VARIANT, ROW, CONFIG = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
NAMES: dict[str, Any] = {"Row": conformance.Row}
exec(compile(VARIANT, PAGE.name, "exec"), NAMES)
MADE: conformance.Row = eval(ROW, NAMES)


def meant(check: Any) -> bool:
    """Whether the check is quick, and its rows are such as merge, as this one does."""
    if any(mark.name == "slow" for mark in check.pytestmark):
        return False
    rows = [row.values[0] for mark in check.pytestmark if mark.args[:1] == ("row",) for row in mark.args[1]]
    return any(row.merges == MADE.merges for row in rows)


CHECKS = [check for name, check in sorted(vars(test_conformance).items())
          if name.startswith("test_") and "row" in inspect.signature(check).parameters and meant(check)]


def test_the_variant_has_fifteen_lines() -> None:
    assert len([line for line in VARIANT.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(check: Any, tmp_path: Path) -> None:
    given = {"row": MADE, "scan": True, "tmp_path": tmp_path}
    with jax.numpy_dtype_promotion("standard"):  # as in test_conformance
        check(**{name: given[name] for name in inspect.signature(check).parameters})


def test_the_conformance_tests_notice_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        test_conformance.test_leaf_table_names_the_real_shapes(MADE._replace(shapes={"A": (12, 4), "B": (4, 9)}))
    right = NAMES["Signs"].factors
    monkeypatch.setattr(NAMES["Signs"], "factors", lambda self, adapter, w: right(self, adapter, w)._replace(b=None))
    with pytest.raises(AssertionError):
        test_conformance.test_factors_and_delta_agree(MADE)


def test_the_config_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "NAMES", MappingProxyType({**variants.NAMES, "signs": NAMES["Signs"]}))
    made: dict[str, Any] = {}
    exec(compile(CONFIG, PAGE.name, "exec"), made)
    assert build.variant(made["get_config"]("rank=3")) == NAMES["Signs"](rank=3)
