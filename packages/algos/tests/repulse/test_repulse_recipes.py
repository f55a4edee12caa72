"""The recipes of RePULSe's experiments have the numbers of the paper's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Run
from rlhf_core.analysis.sweep import read_sweep
from rlhf_core.config.builder import from_names

FOLDER = Path(__file__).resolve().parents[4] / "recipes" / "repulse"

# (alpha, beta, lr of the policy, lr of proposal or critic, steps): sections 3 and 4 of the released README
TABLES: dict[str, dict[str, tuple[Any, ...]]] = {
    "toy": {
        "ppo": (None, None, 1e-4, 3e-5, 500),
        "reinforce": (None, None, 1e-4, None, 500),
        "transformed": (1, -1, 1e-4, None, 500),
        "base": (0.01, -10, 1e-4, None, 500),
        "repulse": (0.01, -10, 1e-4, 3e-4, 250),
    },
    "toy-kl": {
        "reinforce": (None, None, 1e-5, None, 500),
        "transformed-1": (1, -1, 1e-5, None, 500),
        "transformed-10": (10, -1, 1e-5, None, 500),
        "repulse-beta-1": (100, -1, 1e-5, 3e-4, 250),
        "repulse-beta-10": (100, -10, 1e-5, 3e-4, 250),
    },
    "setting1": {
        "ppo": (None, None, 3e-5, 3e-5, 1600),
        "reinforce": (None, None, 3e-5, None, 1600),
        "transformed-a1-b0.1": (1, -0.1, 3e-5, None, 1600),
        "transformed-a0.3-b0.5": (0.3, -0.5, 3e-5, None, 1600),
        "transformed-a1-b0.3": (1, -0.3, 3e-5, None, 1600),
        "transformed-a1-b0.5": (1, -0.5, 3e-5, None, 1600),
        "base-a0.1": (0.1, -30, 3e-5, None, 1600),
        "base-a1": (1, -30, 3e-5, None, 1600),
        "repulse-b10": (0.1, -10, 3e-5, 3e-5, 800),
        "repulse-b20": (0.1, -20, 3e-5, 2e-5, 800),
        "repulse-b30": (0.1, -30, 3e-5, 1e-5, 800),
    },
    "setting2": {
        "ppo": (None, None, 3e-7, 3e-6, 4000),
        "reinforce": (None, None, 1e-7, None, 4000),
        "transformed-a3-b0.3-lr1e-7": (3, -0.3, 1e-7, None, 4000),
        "transformed-a1-b1-lr1e-7": (1, -1, 1e-7, None, 4000),
        "transformed-a3-b0.3-lr3e-7": (3, -0.3, 3e-7, None, 4000),
        "transformed-a1-b1-lr3e-7": (1, -1, 3e-7, None, 4000),
        "base-a0.1": (0.1, -10, 3e-7, None, 4000),
        "base-a1": (1, -10, 1e-7, None, 4000),
        "repulse-a0.1": (0.1, -5, 3e-7, 3e-7, 2000),
        "repulse-a0.2": (0.2, -5, 3e-7, 3e-7, 2000),
    },
}
SHAPES = {
    "toy": (1, 500, 2, 0.0),
    "toy-kl": (1, 500, 2, 10.0),
    "setting1": (50, 5, 20, 0.2),
    "setting2": (20, 4, 100, 2.0),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_the_table_is_a_method(name):
    members = read_sweep(FOLDER / f"{name}-sweep.toml").members
    found = {}
    for member in members:
        tree: Any = member.settings
        tilt = tree["algorithm"] if tree["algorithm"]["use"] == "repulse" else tree.get("advantage", {})
        other = tree.get("proposal") or tree.get("critic") or {}
        beta = tilt.get("target", tilt).get("beta")
        row = (tilt.get("alpha"), beta, tree["actor"]["optim"]["lr"], other.get("optim", {}).get("lr"), tree["steps"])
        assert found.setdefault(member.method, row) == row
        shape = (tree["batch_size"], tree["sampling"]["n"], tree["sampling"]["max_new_tokens"], tree["algorithm"]["kl"]["coef"]
                 if "kl" in tree["algorithm"] else 0.0)  # fmt: skip
        assert shape == SHAPES[name]
        if tree["algorithm"]["use"] == "repulse":
            assert tree["algorithm"]["compat"] == "original", "alpha is the released one"
        else:
            assert tree["loss"]["aggregate"] == "sequence", "and so is the scale of the others"
    assert found == TABLES[name]


@pytest.mark.parametrize("name", [*TABLES, "smollm2", "tiny"])
def test_methods_get_equal_numbers_of_samples(name):
    drawn = set()
    for member in read_sweep(FOLDER / f"{name}-sweep.toml").members:
        tree: Any = member.settings
        both = (
            2
            if tree["algorithm"]["use"] == "repulse" and tree["algorithm"].get("proposal", "learned") == "learned"
            else 1
        )
        drawn.add(both * tree["steps"] * tree["batch_size"] * tree["sampling"]["n"])
    assert len(drawn) == 1


TINY: dict[str, Any] = {
    "model": "tiny:hidden=16,layers=1",
    "data": {"use": "prompts"},
    "reward": {"use": "length", "target": 2},
    "batch_size": 2,
    "sampling": {"n": 2, "max_new_tokens": 2},
}
"""What stands in for models, data and sizes that this machine does not have."""

ALIKE = ("transformed-", "repulse-", "base-")
"""Methods of these names differ in numbers alone."""


def kinds() -> list[Any]:
    """A method of each kind of every sweep; all the others are slow, and add little."""
    found: dict[tuple[str, str], Any] = {}
    for name in TABLES:
        for member in read_sweep(FOLDER / f"{name}-sweep.toml").members:
            found.setdefault((name, next(filter(member.method.startswith, ALIKE), member.method)), member)
    return [pytest.param(name, member, id=f"{name}-{member.method}") for (name, _), member in found.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "member"), kinds())
def test_a_step_of_every_kind_of_method_on_a_tiny_model(name, member, tmp_path):
    """The options of the recipes as they are; a setting leaves its table of held-out samples, a toy its probability."""
    tree: Any = {**member.settings, **TINY, "steps": 1, "eval_every": 0, "save_every": 0, "output": str(tmp_path)}
    for role in ("actor", "reference", "proposal", "critic"):
        if role in tree:
            tree[role] = {**tree[role], "dtype": "float32"}
    tree["evaluator"] = {**tree["evaluator"], **({"ids": [66]} if name.startswith("toy") else {"prompts": 2})}
    run = Run(from_names(tree))
    run.train()
    (last,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    both = 2 if "repulse" in member.method else 1
    assert last["samples"] == both * 4
    assert (tmp_path / "heldout.parquet").exists() == name.startswith("setting")
    assert any(name.startswith("eval/") for name in run.evaluations[-1][1])
