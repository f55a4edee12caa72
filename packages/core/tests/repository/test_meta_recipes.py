"""Every recipe that is shipped is a run: its names exist, its options are options, and they fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.analysis.sweep import read_sweep
from rlhf_core.config.builder import from_names, parse, to_toml
from rlhf_core.plugins.registry import Registry
from rlhf_core.recipe.engine import Engine
from rlhf_core.recipe.reading import read_recipe
from rlhf_core.training.planner import make_plan

pytest.importorskip("rlhf_algos", reason="recipes use the algorithms of rlhf-algos")

FOLDER = Path(__file__).resolve().parents[4] / "recipes"
SWEEPS = sorted(FOLDER.rglob("*-sweep.toml"))
PIPELINES = sorted((FOLDER / "pipelines").glob("*.toml"))
RECIPES = sorted(set(FOLDER.rglob("*.toml")) - set(SWEEPS) - set(PIPELINES))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_a_plan(recipe: Path) -> None:
    named = parse(["--config", str(recipe)], Registry()).model
    model = [] if named else ["--model", "tiny"]  # of a recipe for whatever model a user names
    assert make_plan(parse(["--config", str(recipe), *model], Registry())).terms


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_written_out_is_the_same_run(recipe: Path, tmp_path: Path) -> None:
    config = parse(["--config", str(recipe)], Registry())
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.toml")], Registry()) == config


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_makes_a_plan(sweep: Path) -> None:
    members = read_sweep(sweep).members
    for method in dict.fromkeys(member.method for member in members):
        settings = next(member.settings for member in members if member.method == method)
        assert make_plan(from_names(settings)).terms, method


@pytest.mark.parametrize("recipe", PIPELINES, ids=lambda path: path.stem)
def test_every_step_of_a_pipeline_can_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if 'use = "gcg"' in recipe.read_text(encoding="utf-8"):
        pytest.importorskip("rlhf_eval_gcg", reason="attacks come with rlhf-eval-gcg")
    monkeypatch.chdir(FOLDER.parent)
    Engine(read_recipe(recipe), Registry()).check()


@pytest.mark.parametrize("recipe", [*RECIPES, *SWEEPS, *PIPELINES], ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for(recipe: Path) -> None:
    assert recipe.read_text(encoding="utf-8").startswith("# ")
