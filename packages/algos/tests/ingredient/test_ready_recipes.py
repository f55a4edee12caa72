"""Every recipe with a twin for SmolLM2 runs through, with a tiny model and little data in the place of SmolLM2."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from in_process import run_in_this_process

from rlhf_algos.one_pass.store import load_estimator
from rlhf_core.plugins.registry import Registry
from rlhf_core.recipe.engine import Engine
from rlhf_core.recipe.reading import read_recipe

ROOT = Path(__file__).resolve().parents[4]
FOLDER = ROOT / "recipes" / "pipelines"
SMALL = "model=tiny:hidden=16,layers=1 most=4 heldout=4 tokens=12"
TWINS = {
    "iterative-dpo": "iterations=2 batch=2 epochs=1",
    "online-dpo": "iterations=2 batch=2",
    "online-ppo-one-pass": "iterations=2 slices=3 first=2/3 steps=1 batch=2 ties=keep",
    "online-ppo-regular": "iterations=2 slices=3 first=2/3 steps=1 batch=2 ties=keep epochs=1",
    "sft-rm-ppo": "steps=1 batch=2 epochs=1",
    "rejection-sampling": "iterations=2 batch=2",
    "deployment": "rounds=2 slices=3 first=2/3 steps=1 batch=2 ties=keep",
}
SELECTORS = (
    "optimistic beta=9", "best_second", "best_quartile", "best_worst", "random_pair", "max_uncertainty", "drts", "delta_ucb",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run_in_this_process(monkeypatch)


def cook(name: str, output: Path, values: str) -> Path:
    """Run a twin with other values of its variables; return the folder of its steps."""
    given = dict(each.split("=", 1) for each in shlex.split(values))
    recipe = read_recipe(FOLDER / f"{name}-smollm2.toml", given, output=str(output))
    Engine(recipe, Registry(), report=lambda line: None).run()
    return output / "steps"


def metrics(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_runs_through(name: str, tmp_path: Path) -> None:
    steps = cook(name, tmp_path, f"{SMALL} {TWINS[name]}")
    (results,) = steps.glob("*-collect/results.csv")
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(math.isfinite(float(row["eval/heldout/reward"])) for row in rows)
    weights = {path.read_bytes() for path in steps.glob("*/run/model/model.safetensors")}
    assert len(weights) == len(list(steps.glob("*/run/model/model.safetensors"))) >= 2, "each training moved its model"


def test_a_one_pass_reward_model_sees_each_pair_once(tmp_path: Path) -> None:
    steps = cook("online-ppo-one-pass", tmp_path, f"{SMALL} {TWINS['online-ppo-one-pass']}")
    pairs = [len(path.read_text().splitlines()) for path in sorted(steps.glob("*pairs/pairs.jsonl"))]
    seen = [load_estimator(steps / step / "state").t for step in ("t0-first_rm", "t0-rm", "t1-rm")]
    assert len(pairs) == 3 and seen == [pairs[0], sum(pairs[:2]), sum(pairs)]


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_strategy_of_deployment_is_a_value_of_the_recipe(selector: str, tmp_path: Path) -> None:
    values = f"{SMALL} rounds=1 slices=2 first=1/2 steps=1 batch=2 ties=keep 'selector={selector}'"
    steps = cook("deployment", tmp_path, values)
    found = metrics(steps / "t0-pairs" / "statistics.json")
    assert found["pairs"] > 0 and found["regret"] >= 0
    (table,) = steps.glob("*-regret/results.csv")
    assert table.read_text().count("\n") == 2


@pytest.mark.skipif(importlib.util.find_spec("rlhf_eval_gcg") is None, reason="needs rlhf-eval-gcg")
def test_repulse_trains_on_what_gcg_found(tmp_path: Path) -> None:
    values = "rounds=1 seen=:1 heldout=11: search_steps=1 width=4 answers=2 steps=1 batch=2 n=2 tokens=3"
    steps = cook("repulse-gcg", tmp_path, f"model=tiny:hidden=16,layers=1 {values}")
    given = (FOLDER / "requests.jsonl").read_text().splitlines()
    read = (steps / "t0-repulse" / "data-all.jsonl").read_text().splitlines()
    found = (steps / "t0-attack" / "prompts.jsonl").read_text().splitlines()
    assert read == [*given, *found] and [json.loads(line)["attack_seed"] for line in found] == [0]
    goals = {json.loads(line)["goal"] for line in (steps / "t0-goals-2" / "attacks.jsonl").read_text().splitlines()}
    assert goals and not goals & {json.loads(line)["goal"] for line in found}, "goals are held out"
    assert metrics(steps / "t0-seen-2" / "metrics.json")["eval/gcg/attacks"] == 1


def test_every_recipe_of_the_hub_has_a_twin() -> None:
    twins = {path.name.removesuffix("-smollm2.toml") for path in FOLDER.glob("*-smollm2.toml")}
    assert twins == {*TWINS, "repulse-gcg"}
    assert twins == {path.stem for path in FOLDER.glob("*.toml") if not path.stem.endswith(("-smollm2", "-tiny"))}
