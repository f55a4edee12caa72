"""Variables of a recipe file: where their values stand, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli.app import main
from rlhf_core.errors import UsageError
from rlhf_core.recipe.plan import Recipe
from rlhf_core.recipe.reading import read_recipe
from rlhf_core.recipe.variables import fill

FILE = """
output = "runs/{name}-{rows}"
total_T = "{slices}"
recipe = [{ repeat = "{slices}", steps = ["sow"] }]
[variables]
name = "wheat"
rows = 3
slices = 2
share = 0.5
dry = false
[ingredients.sow]
rows = "{rows}"
texts = ["{name} of {t}", "{share}"]
table = { dry = "{dry}", unknown = "{x}" }
"""


def recipe(tmp_path: Path, text: str = FILE, **variables: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, variables)


def test_a_text_that_is_a_variable_alone_has_its_type(tmp_path: Path) -> None:
    found = recipe(tmp_path)
    assert (found.output, found.total_T, found.steps) == ("runs/wheat-3", 2, [{"repeat": 2, "steps": ["sow"]}])
    expected: dict[str, Any] = {
        "rows": 3,
        "texts": ["wheat of {t}", 0.5],  # {t} is each step's
        "table": {"dry": False, "unknown": "{x}"},
    }
    assert found.ingredients["sow"] == expected


def test_given_values_have_the_type_of_those_they_replace(tmp_path: Path) -> None:
    found = recipe(tmp_path, name="7", rows="12", share="1", dry="true")
    assert found.output == "runs/7-12" and found.ingredients["sow"]["rows"] == 12
    assert found.ingredients["sow"]["texts"] == ["7 of {t}", 1.0] and found.ingredients["sow"]["table"]["dry"] is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": "many"}, "the variable rows must be of type int, not 'many'"),
        ({"row": "3"}, r"has no variable 'row' \(did you mean 'rows'\?\); it has name, rows, slices, share, dry"),
    ],
)
def test_wrong_values_are_refused(given: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, **given)


@pytest.mark.parametrize("table", ["variables = 3", "[variables]\nt = 3", "[variables]\nlist = [1]"])
def test_wrong_variables_are_refused(table: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="variables"):
        recipe(tmp_path, f"recipe = []\n{table}\n")


def test_a_value_is_not_filled_in_twice() -> None:
    assert fill(["{a}", "x{a}"], {"a": "{b}", "b": 1}) == ["{b}", "x{b}"]
    assert fill({"x": ["{a}-{b}"]}, {"a": 1, "b": 2}) == {"x": ["1-2"]}


def test_the_command_takes_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'recipe = ["rows"]\noutput = "out-{most}"\n[variables]\nmost = 3\n[ingredients.rows]\nmost = "{most}"\n'
    )
    assert main(["recipe", str(path), "--set", "most=2", "--show"]) == 0
    assert "out-2/steps/t0-rows" in capsys.readouterr().out
    assert main(["recipe", str(path), "--set", "most", "--show"]) == 2
    assert "--set takes NAME=VALUE, not 'most'" in capsys.readouterr().err
