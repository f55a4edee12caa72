"""Recipes are expanded and joined as docs/recipes.md says (and as the recipe engine of Online_RLHF does)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kitchen import registry

from rlhf_core.contract.ingredients import Artifact
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import Registry
from rlhf_core.recipe.engine import Engine
from rlhf_core.recipe.ingredients.rows import slice_of
from rlhf_core.recipe.plan import Recipe, Step, expand
from rlhf_core.recipe.reading import plan_of, read_recipe


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (["sft", ["rm", "ppo"], ["rm", "ppo"]], ["sft 0", "rm 0", "ppo 0", "rm 1", "ppo 1"]),
        (["sft"] + [["rm", "ppo"]] * 2, ["sft 0", "rm 0", "ppo 0", "rm 1", "ppo 1"]),
        (["sft", {"repeat": 2, "steps": ["rm"]}, "end"], ["sft 0", "rm 0", "rm 1", "end 2"]),
        ([["rm", "ppo"] * 2], ["rm 0", "ppo 0", "rm 0", "ppo 0"]),  # inside a list it makes a longer group
        ([["a"], "b", ["a"]], ["a 0", "b 1", "a 1"]),  # a string does not advance the iteration
        ([{"repeat": 0, "steps": ["a"]}, []], []),
    ],
)
def test_strings_run_once_and_groups_are_iterations(recipe: list[Any], steps: list[str]) -> None:
    assert [f"{name} {iteration}" for name, iteration in expand(recipe)] == steps


@pytest.mark.parametrize(
    "element", [3, [["a"]], {"repeat": 2}, {"repeat": -1, "steps": []}, {"repeat": True, "steps": []}]
)
def test_other_elements_are_refused(element: Any) -> None:
    with pytest.raises(UsageError, match="group"):
        list(expand([element]))


@pytest.mark.parametrize(("rows", "first", "last"), [(1000, 60, 79), (1003, 60, 79)])
def test_slices_are_equal_and_the_remainder_is_in_none(rows: int, first: int, last: int) -> None:
    part = slice_of(range(rows), 3, 50)
    assert (part[0], part[-1]) == (first, last)
    every = [row for t in range(50) for row in slice_of(range(rows), t, 50)]
    assert every == list(range(1000))
    assert slice_of(range(7), 0, 1) == range(7)


GROW = {"sow": {}, "grow": {"reads": {"plant": "plant"}}, "first": {"use": "grow"}}


def plan(steps: list[Any], ingredients: dict[str, Any] | None = None, **fields: Any) -> list[Step]:
    return plan_of(Recipe(steps, GROW if ingredients is None else ingredients, **fields), registry())


def sources(step: Step, name: str) -> list[str]:
    return [source.step for source in step.reads[name]]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("plant", ["t1-grow"]),
        ("plant@newest", ["t1-grow"]),
        ("plant@previous", ["t0-grow"]),
        ("plant@initial", ["t0-first"]),
    ],
)
def test_a_reference_names_a_version(which: str, expected: list[str]) -> None:
    ingredients = {**GROW, "last": {"use": "grow", "reads": {"plant": which}}}
    steps = plan(["sow", "first", ["grow"], ["grow"], "last"], ingredients)
    assert sources(steps[-1], "plant") == expected
    assert sources(steps[3], "plant") == ["t0-grow"] and sources(steps[2], "plant") == ["t0-first"]


def test_all_versions_of_a_dataset_are_read_in_order() -> None:
    ingredients = {**GROW, "many": {"use": "grow", "reads": {"seeds": "seeds@all"}}}
    steps = plan([["sow"], ["sow", "many"]], ingredients)
    assert sources(steps[-1], "seeds") == ["t0-sow", "t1-sow"]


def test_the_first_version_has_itself_as_the_previous_one() -> None:
    ingredients = {**GROW, "grow": {"reads": {"plant": "plant@previous"}}}
    steps = plan(["sow", "first", "grow"], ingredients)
    assert sources(steps[-1], "plant") == ["t0-first"]


def test_a_second_run_in_one_iteration_has_a_name_of_its_own() -> None:
    names = [step.name for step in plan([["sow", "first", "sow", "grow", "grow"]])]
    assert names == ["t0-sow", "t0-first", "t0-sow-2", "t0-grow", "t0-grow-2"]


def test_only_iterations_from_start_to_stop_run() -> None:
    steps = plan(["sow", ["first"], ["first"], ["first"]], start_t=1, stop_t=2)
    assert [step.name for step in steps if step.runs] == ["t1-first"]


def test_numbers_of_the_recipe_are_filled_in_at_any_depth() -> None:
    steps = plan(
        ["sow", ["first"], ["first"]], {**GROW, "first": {"use": "grow", "note": "{t} of {total_T}, {x}"}}, total_T=2
    )
    notes = [step.provider.note for step in steps[1:]]  # type: ignore[attr-defined]
    assert notes == ["0 of 2, {x}", "1 of 2, {x}"]


@pytest.mark.parametrize(
    ("steps", "change", "message"),
    [
        (["sow", "grwo"], {}, "runs 'grwo', but has no ingredient of that name (did you mean 'grow'?)"),
        (["grow"], {}, "t0-grow reads 'plant' as its plant, but no artifact or earlier step has this name"),
        (["sow", "first"], {"first": {"use": "grow", "reads": {"seeds": "sead"}}}, "did you mean 'seeds'"),
        (
            ["sow", "first"],
            {"first": {"use": "grow", "reads": {"water": "seeds"}}},
            "the inputs are plant, seeds, sun",
        ),
        (["sow", "first"], {"first": {"use": "grow", "writes": {"leaf": "x"}}}, "the outputs are plant"),
        (["sow", "first"], {"first": {"use": "grow", "reads": {"sun": "seeds"}}}, "must be a metrics, not a dataset"),
        (["sow", "first"], {"first": {"use": "grow", "reads": {"seeds": "seeds@al"}}}, "did you mean 'all'"),
        (
            ["sow", "first", "last"],
            {"last": {"use": "grow", "reads": {"sun": "plant@all"}}},
            "must be a metrics, not a table",
        ),
        (["sow"], {"sow": {"use": "sow", "row": 3}}, "has no option 'row' (did you mean 'rows'?)"),
        (["sow"], {"sow": {"use": "sow", "rows": "many"}}, "rows must be INT, not 'many'"),
        (["sow"], {"sow": {"use": "plough"}}, "no ingredient is called 'plough'"),
        (["sow"], {"sow": 3}, "must be a table"),
        (["train"], {"train": {"settings": {"steps": 2}}}, "needs algorithm"),
        (["train"], {"train": {"settings": {"algorithm": "sft", "seed": 2}}}, "cannot set 'seed'"),
        (["train"], {"train": {}}, "train needs settings"),
        (["rows"], {"rows": {"part": "3/3"}}, "part must be t/T"),
        (["evaluate"], {"evaluate": {"settings": {}}}, "needs evaluator"),
        (
            ["sow", "score"],
            {"score": {"reads": {"completions": "seeds"}}},
            't0-score: settings needs reward = {use = "NAME"}',
        ),
    ],
)
def test_a_mistake_is_named(steps: list[Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(steps, {**GROW, **change})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = [", "not valid TOML"),
        ("recipes = []", "unknown key 'recipes' (did you mean 'recipe'?)"),
        ('[algorithm]\nuse = "dpo"', "is the configuration of a run, not a recipe; pass it as rlhf-run --config"),
        ("seed = 1", "a recipe needs `recipe`"),
        ("recipe = []\nstop_t = -1", "stop_t must be a whole number"),
        ("recipe = []\n[artifacts.a]\nkind = 'modell'\npath = 'x'", "artifacts.a must be"),
    ],
)
def test_a_mistake_in_the_file_names_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_recipe(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_file_means_what_python_means(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'recipe = ["sow", { repeat = 2, steps = ["grow"] }]\nseed = 3\noutput = "out"\n'
        '[artifacts.plant]\nkind = "metrics"\npath = "p.json"\n[ingredients.sow]\n[ingredients.grow]\nby = 2\n'
    )
    assert read_recipe(path, stop_t=1) == Recipe(
        ["sow", {"repeat": 2, "steps": ["grow"]}],
        {"sow": {}, "grow": {"by": 2}},
        {"plant": Artifact("metrics", Path("p.json"))},
        "out",
        seed=3,
        stop_t=1,
    )


@pytest.mark.parametrize(
    ("ingredient", "table", "message"),
    [
        ("generate", {"settings": {"sampling": {"temprature": 1.0}}}, "--sampling.temperature"),
        ("score", {"settings": {"reward": {"use": "length", "targt": 3}}}, "--reward.target"),
        ("score", {"reads": {"reward": "rm"}, "settings": {"reward": {"dtyp": "bfloat16"}}}, "--reward.dtype"),
        ("train", {"settings": {"algorithm": "gropo"}}, "no algorithm is called 'gropo'"),
        ("evaluate", {"settings": {"evaluator": "heldut"}}, "heldout"),
        ("rows", {"data": "jsn path=x"}, "json"),
    ],
)
def test_options_of_commands_are_checked_before_the_first_step(
    ingredient: str, table: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    given = {name: Artifact("dataset", file) for name in ("rows", "completions")}
    artifacts = {**given, "model": Artifact("model", Path("tiny")), "rm": Artifact("model", Path("tiny"))}
    with pytest.raises(UsageError, match=f"^t0-{ingredient}: ") as error:
        Engine(Recipe([ingredient], {ingredient: table}, artifacts, tmp_path / "out"), Registry()).check()
    assert message in str(error.value)
