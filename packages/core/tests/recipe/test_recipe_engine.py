"""Steps of a recipe run once, continue where they were stopped, and run again for a reason only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kitchen import Sow, cook, made, registry

from rlhf_core.cli.app import main
from rlhf_core.contract.ingredients import Artifact
from rlhf_core.errors import ContractError, RunStopped, UsageError
from rlhf_core.recipe.engine import Engine
from rlhf_core.recipe.plan import Recipe

STEPS = ["sow", "first", {"repeat": 2, "steps": ["grow"]}, "side"]
INGREDIENTS: dict[str, Any] = {
    "sow": {},
    "first": {"use": "grow"},
    "grow": {"reads": {"plant": "plant"}},
    "side": {"use": "grow", "writes": {"plant": "other"}},
}
ALL = ["t0-sow", "t0-first", "t0-grow", "t1-grow", "t2-side"]


def changed(name: str, **options: Any) -> dict[str, Any]:
    return {**INGREDIENTS, name: {**INGREDIENTS[name], **options}}


def test_a_recipe_runs_once(tmp_path: Path) -> None:
    assert cook(tmp_path / "out", STEPS, INGREDIENTS) == ALL
    assert made(tmp_path / "out", "t1-grow")["height"] == 9 and made(tmp_path / "out", "t1-grow")["iteration"] == 1
    assert cook(tmp_path / "out", STEPS, INGREDIENTS) == []


@pytest.mark.parametrize(
    ("name", "options", "again"),
    [
        ("grow", {"by": 2}, ["t0-grow", "t1-grow"]),
        ("first", {"by": 2}, ["t0-first", "t0-grow", "t1-grow"]),
        ("side", {"by": 2}, ["t2-side"]),
        ("sow", {"rows": 4}, ALL),
        ("sow", {"secret": "other"}, ["t0-sow"]),  # it makes the same again, and nothing after it runs
    ],
)
def test_a_changed_option_runs_again_what_it_affects(
    name: str, options: dict[str, Any], again: list[str], tmp_path: Path
) -> None:
    cook(tmp_path / "out", STEPS, INGREDIENTS)
    assert cook(tmp_path / "out", STEPS, changed(name, **options)) == again


def test_more_iterations_add_steps_and_repeat_none(tmp_path: Path) -> None:
    cook(tmp_path / "out", STEPS[:3], INGREDIENTS)
    more = [*STEPS[:2], {"repeat": 4, "steps": ["grow"]}]
    assert cook(tmp_path / "out", more, INGREDIENTS) == ["t2-grow", "t3-grow"]
    assert made(tmp_path / "out", "t3-grow")["height"] == 15


def test_another_seed_is_another_recipe_and_the_same_seed_the_same_numbers(tmp_path: Path) -> None:
    cook(tmp_path / "one", STEPS, INGREDIENTS)
    cook(tmp_path / "two", STEPS, INGREDIENTS)
    assert made(tmp_path / "one", "t1-grow") == made(tmp_path / "two", "t1-grow")
    assert made(tmp_path / "one", "t1-grow")["drawn"] != made(tmp_path / "one", "t0-grow")["drawn"]
    assert cook(tmp_path / "two", STEPS, INGREDIENTS, seed=1) == ALL
    assert made(tmp_path / "one", "t1-grow") != made(tmp_path / "two", "t1-grow")


def test_a_given_file_that_changes_runs_again_what_reads_it(tmp_path: Path) -> None:
    plant = tmp_path / "plant.json"
    plant.write_text('{"height": 100}')
    given = {"plant": Artifact("metrics", plant)}
    steps = ["sow", "grow"]
    assert cook(tmp_path / "out", steps, INGREDIENTS, artifacts=given) == ["t0-sow", "t0-grow"]
    assert made(tmp_path / "out", "t0-grow")["height"] == 103
    plant.write_text('{"height": 200}')
    assert cook(tmp_path / "out", steps, INGREDIENTS, artifacts=given) == ["t0-grow"]


def test_all_versions_are_one_file(tmp_path: Path) -> None:
    ingredients = {**INGREDIENTS, "many": {"use": "grow", "reads": {"seeds": "seeds@all"}}}
    cook(tmp_path / "out", [["sow"], ["sow"], "many"], ingredients)
    assert made(tmp_path / "out", "t2-many")["height"] == 6
    table = {"use": "collect", "reads": {"table": "plant@all"}, "metrics": []}
    cook(tmp_path / "two", [*STEPS[:3], "collect"], {**INGREDIENTS, "collect": table})
    lines = (tmp_path / "two" / "steps" / "t2-collect" / "results.csv").read_text().splitlines()
    assert lines[0] == "version,height,iteration,drawn"
    assert [line.split(",")[:3] for line in lines[1:]] == [["0", "3", "0"], ["1", "6", "0"], ["2", "9", "1"]]


def test_a_failing_step_stops_the_recipe_which_then_continues_inside_it(tmp_path: Path) -> None:
    steps, ingredients = ["sow", "wait", "side"], {**INGREDIENTS, "wait": {}}
    with pytest.raises(RunStopped, match="failed") as stopped:
        cook(tmp_path / "out", steps, ingredients)
    assert stopped.value.exit_code == 7
    assert not (tmp_path / "out" / "steps" / "t0-side").exists()
    assert cook(tmp_path / "out", steps, ingredients) == ["t0-wait", "t0-side"]
    assert made(tmp_path / "out", "t0-wait") == {"begun": 2}  # it found what it had left


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_command_ends_with_the_exit_code_of_the_step_that_failed(
    jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('recipe = ["sow", "wait", "grow"]\n[ingredients.sow]\n[ingredients.wait]\n[ingredients.grow]\n')
    words = ["-p", "kitchen", "recipe", str(file), "--output", str(tmp_path / "out"), "--jobs", jobs]
    assert main(words) == 7
    assert capsys.readouterr().err.strip() == "rlhf-run: the ingredient failed"
    assert main(words) == 0 and made(tmp_path / "out", "t0-wait") == {"begun": 2}


def test_a_stopped_step_that_changed_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        cook(tmp_path / "out", ["wait"], {"wait": {}})
    with pytest.raises(RunStopped):
        cook(tmp_path / "out", ["wait"], {"wait": {"how": "other"}})


def test_a_killed_recipe_continues(tmp_path: Path) -> None:
    """SIGKILL inside a step, and then at the two places where a finished step gets its name."""
    (tmp_path / "recipe.toml").write_text(
        'recipe = ["sow", "wait", "grow"]\noutput = "out"\n'
        '[ingredients.sow]\n[ingredients.wait]\nhow = "kill"\n[ingredients.grow]\n'
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "rlhf_core", "-p", "kitchen", "recipe", "recipe.toml"]
    for code in (-9, 0):
        done = subprocess.run(
            words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=300
        )
        assert done.returncode == code, done.stderr
    output = tmp_path / "out"
    assert made(output, "t0-wait") == {"begun": 2}
    plant, folder, work = made(output, "t0-grow"), output / "steps" / "t0-grow", output / "steps" / ".t0-grow.work"
    folder.rename(work)  # killed after the record was written
    ingredients = {"sow": {}, "wait": {"how": "kill"}, "grow": {}}
    assert cook(output, ["sow", "wait", "grow"], ingredients) == []
    assert made(output, "t0-grow") == plant and not work.exists()
    folder.rename(work)
    (work / "step.json").unlink()  # killed before that
    assert cook(output, ["sow", "wait", "grow"], ingredients) == ["t0-grow"]
    assert made(output, "t0-grow") == plant


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    cook(tmp_path / "out", STEPS, INGREDIENTS)
    (tmp_path / "out" / "steps" / "t0-first" / "plant.json").unlink()
    assert cook(tmp_path / "out", STEPS, INGREDIENTS) != []
    (tmp_path / "out" / "steps" / "t0-first" / "step.json").write_text("{")
    cook(tmp_path / "out", STEPS, INGREDIENTS)
    assert made(tmp_path / "out", "t1-grow")["height"] == 9


def test_independent_steps_run_at_once(tmp_path: Path) -> None:
    together = str(tmp_path / "meeting")
    ingredients = {"one": {"use": "wait", "together": together}, "two": {"use": "wait", "together": together}}
    assert sorted(cook(tmp_path / "out", ["one", "two"], ingredients, jobs=2)) == ["t0-one", "t0-two"]
    with pytest.raises(RunStopped, match="failed"):
        cook(tmp_path / "bad", ["sow", "wait", "side"], {**INGREDIENTS, "wait": {}}, jobs=2)


def test_steps_together_make_what_steps_in_turn_make(tmp_path: Path) -> None:
    cook(tmp_path / "one", STEPS, INGREDIENTS)
    assert sorted(cook(tmp_path / "two", STEPS, INGREDIENTS, jobs=3)) == sorted(ALL)
    for step in ("t1-grow", "t2-side"):
        assert made(tmp_path / "one", step)["height"] == made(tmp_path / "two", step)["height"]


def test_iterations_that_are_left_out_must_have_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="t1-grow reads plant of t0-grow, which is outside start_t and stop_t"):
        cook(tmp_path / "out", STEPS, INGREDIENTS, start_t=1)
    cook(tmp_path / "out", STEPS, INGREDIENTS, stop_t=1)
    assert cook(tmp_path / "out", STEPS, INGREDIENTS, start_t=1) == ["t1-grow", "t2-side"]


def test_nothing_of_the_user_is_touched(tmp_path: Path) -> None:
    mine = tmp_path / "out" / "steps" / "t0-sow" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UsageError, match="steps"):
        cook(tmp_path / "out", STEPS, INGREDIENTS)
    cook(tmp_path / "two", STEPS, INGREDIENTS)
    other = tmp_path / "two" / "steps" / "t3-grow"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="was not made by this recipe"):
        cook(tmp_path / "two", [*STEPS[:2], {"repeat": 4, "steps": ["grow"]}], INGREDIENTS)
    assert mine.read_text() == (other / "mine.txt").read_text() == "mine"


def test_what_an_ingredient_does_not_declare_is_its_authors_mistake(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"t0-wait: the ingredient wait of \(local\) must make begun, not seeds"):
        cook(tmp_path / "out", ["wait"], {"wait": {"how": "wrong"}})


def test_no_option_is_written_down(tmp_path: Path) -> None:
    cook(tmp_path / "out", ["sow"], {"sow": {"secret": "hunter2"}})
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert texts and not any(b"hunter2" in text for text in texts)


def test_states_say_why_a_step_runs(tmp_path: Path) -> None:
    def states(ingredients: dict[str, Any]) -> dict[str, str]:
        engine = Engine(Recipe(STEPS, ingredients, output=tmp_path / "out", stop_t=2), registry())
        return {name: f"{state.word} {state.reason}".strip() for name, state in engine.states().items()}

    assert states(INGREDIENTS)["t0-sow"] == "to run it has not run yet"
    assert states(INGREDIENTS)["t2-side"].startswith("left out")
    cook(tmp_path / "out", STEPS, INGREDIENTS, stop_t=2)
    assert states(INGREDIENTS)["t0-grow"] == "finished"
    now = states(changed("first", by=5))
    assert now["t0-sow"] == "finished" and now["t0-first"] == "to run changed: option by"
    assert now["t0-grow"] == "to run t0-first runs first; this step is skipped if the result is the same"


def test_a_forgotten_step_runs_again(tmp_path: Path) -> None:
    cook(tmp_path / "out", STEPS, INGREDIENTS)
    engine = Engine(Recipe(STEPS, INGREDIENTS, output=tmp_path / "out"), registry())
    engine.forget("t0-first")
    assert cook(tmp_path / "out", STEPS, INGREDIENTS) == ["t0-first"]
    with pytest.raises(UsageError, match="no step 'first'; its steps are t0-sow"):
        engine.forget("first")


def test_ingredients_may_be_given_from_python(tmp_path: Path) -> None:
    ingredients = {**INGREDIENTS, "sow": {"use": Sow(rows=5)}}
    cook(tmp_path / "out", STEPS[:2], ingredients)
    assert made(tmp_path / "out", "t0-first")["height"] == 5
    assert cook(tmp_path / "out", STEPS[:2], {**ingredients, "sow": {"use": Sow(rows=5)}}) == []
    assert cook(tmp_path / "out", STEPS[:2], {**ingredients, "sow": {"use": Sow(rows=6)}}) == ["t0-sow", "t0-first"]


def test_a_missing_file_is_named_before_the_first_step(tmp_path: Path) -> None:
    given = {"seeds": Artifact("dataset", tmp_path / "gone.jsonl")}
    with pytest.raises(UsageError, match=r"gone\.jsonl: there is no such dataset"):
        cook(tmp_path / "out", ["first"], INGREDIENTS, artifacts=given)
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_run_one_recipe(tmp_path: Path) -> None:
    cook(tmp_path / "out", ["sow"], INGREDIENTS)
    engine = Engine(Recipe(["sow"], INGREDIENTS, output=tmp_path / "out"), registry())
    with engine._hold_lock(), pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        cook(tmp_path / "out", ["sow"], INGREDIENTS)


def test_a_record_holds_checksums_of_what_it_was_made_of(tmp_path: Path) -> None:
    cook(tmp_path / "out", STEPS, INGREDIENTS)
    record = json.loads((tmp_path / "out" / "steps" / "t0-grow" / "step.json").read_text())
    assert set(record["made_of"]) == {"provider", "seed", "option by", "option note", "input plant", "input seeds"}
    assert record["outputs"]["plant"]["path"] == "plant.json"
