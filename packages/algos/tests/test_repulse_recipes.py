"""The recipes of RePULSe's experiments have the numbers of the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core.sweep import read_sweep

FOLDER = Path(__file__).resolve().parents[3] / "recipes" / "repulse"

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


@pytest.mark.parametrize("name", [*TABLES, "smollm2"])
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
