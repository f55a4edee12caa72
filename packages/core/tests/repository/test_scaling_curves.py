"""`benchmarks/scaling.py` runs every curve at tiny sizes, and its figures follow from the points."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks"
NAMES = sorted(
    {
        name
        for path in (BENCHMARKS / "scaling_curves").glob("*.py")
        for name in re.findall(r'^@curve\("(\w+)"', path.read_text("utf-8"), re.MULTILINE)
    }
)

OF_ALGORITHMS = ("collectives",)
"""Curves that run algorithms of rlhf-algos."""


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("scaling")
    script.load()
    return script


@pytest.mark.parametrize("name", NAMES)
def test_a_curve_runs_at_tiny_sizes(scaling: ModuleType, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in OF_ALGORITHMS:
        pytest.importorskip("rlhf_algos", reason="the curve runs GRPO")
    assert scaling.main(["--quick", "--only", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: ")
    assert "exponent" in said
    assert "MISSED" not in said  # no figure of tiny sizes is judged


def test_the_exponent_and_the_constant_are_those_of_the_power_law(scaling: ModuleType) -> None:
    curve = sys.modules["scaling_curves.curve"]
    series = curve.Series("t", "rows", "s", [(n, 3.0 * n**1.5) for n in (1, 10, 400)])
    assert series.exponents == pytest.approx([1.5, 1.5])
    assert series.constant == pytest.approx(3.0 * 400**0.5)


@pytest.mark.parametrize(
    ("value", "at_least", "code"), [(1.3, False, 1), (1.1, False, 0), (1.3, True, 0), (1.1, True, 1)]
)
def test_a_ratio_over_its_limit_is_named(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, value: float, at_least: bool, code: int
) -> None:
    curve = sys.modules["scaling_curves.curve"]
    measured = curve.Measured(
        [curve.Series("t", "rows", "s", [(1, 1), (2, 2)])], [curve.Ratio("r", value, 1.2, at_least)]
    )
    monkeypatch.setitem(curve.CURVES, "one", curve.Curve("of a test", lambda quick: measured))
    assert scaling.main(["--only", "one"]) == code
    assert scaling.main(["--only", "one", "--quick"]) == 0
