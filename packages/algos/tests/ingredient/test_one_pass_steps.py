"""One-pass reward models in a recipe: the curvature continues in the next iteration, and its uncertainty reaches selectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import run_in_this_process

from rlhf_algos.one_pass.store import load_estimator, read_state
from rlhf_core import Artifact, Recipe, UsageError
from rlhf_core.plugins.registry import Registry
from rlhf_core.recipe.engine import Engine

WORDS = ("alpha", "be", "gamma ray", "d", "epsilon", "zeta zeta", "eta", "theta th")
RM = {"algorithm": "reward", "batch_size": 2, "reward": {"freeze": ["body"], "optim": {"use": "omd", "damping": 0.5}}}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_this_process(monkeypatch)


def write(path: Path, rows: list[dict[str, Any]]) -> Artifact:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Artifact("dataset", path)


def recipe(folder: Path, steps: list[Any], **more: Any) -> Recipe:
    """Return a recipe of two trainings on 4 pairs each, and scores of 8 completions with their uncertainty."""
    pairs = [{"prompt": f"{word}?", "chosen": word.upper(), "rejected": word[::-1]} for word in WORDS]
    completions = [
        {"uid": uid, "k": k, "prompt": WORDS[uid], "completion": WORDS[k] * (1 + uid)}
        for uid in (0, 1)
        for k in range(4)
    ]
    ingredients = {
        "first": {"use": "train", "reads": {"data": "early"}, "writes": {"model": "reward"}, "settings": RM},
        "next": {
            "use": "train",
            "reads": {"model": "reward", "data": "late", "state": "state"},
            "writes": {"model": "reward"},
            "settings": RM,
        },
        "score": {"reads": {"reward": "reward", "state": "state"}, "settings": {"reward": "uncertain"}},
        "pairs": {"selector": "drts"},
        "ucb": {"use": "pairs", "selector": "delta_ucb beta=2"},
        **more,
    }
    artifacts = {
        "model": Artifact("model", Path("tiny:hidden=16,layers=1")),
        "early": write(folder / "early.jsonl", pairs[:4]),
        "late": write(folder / "late.jsonl", pairs[4:]),
        "completions": write(folder / "completions.jsonl", completions),
    }
    return Recipe(steps, ingredients, artifacts, folder / "out")


def state_of(folder: Path, step: str) -> Path:
    return folder / "out" / "steps" / step / "state"


def test_the_curvature_continues_and_selectors_read_it(tmp_path: Path) -> None:
    Engine(recipe(tmp_path, ["first", "next", "score", "pairs", "ucb"]), Registry()).run()
    first, second = (load_estimator(state_of(tmp_path, f"t0-{name}")) for name in ("first", "next"))
    assert (first.t, second.t) == (4, 8)
    added_DD = second.curvature.inverse_DD - first.curvature.inverse_DD
    assert torch.linalg.matrix_rank(added_DD, tol=1e-9) == 4, "four further pairs, on the curvature of the first four"
    v_D = torch.ones(first.d, dtype=torch.float64)
    assert (
        float(second.curvature.norm_inverse(v_D[None])) < float(first.curvature.norm_inverse(v_D[None])) < 0.5**-0.5 * 4
    )
    assert not (tmp_path / "out/steps/t0-next/run/checkpoints").exists()  # the state alone is kept
    rows = [json.loads(line) for line in (tmp_path / "out/steps/t0-score/scored.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(0 < row["uncertainty"] < 10 for row in rows)
    for step in ("t0-pairs", "t0-ucb"):
        pairs = [json.loads(line) for line in (tmp_path / "out/steps" / step / "pairs.jsonl").read_text().splitlines()]
        assert [pair["uid"] for pair in pairs] == [0, 1]


def test_an_optimizer_without_such_a_state_hands_on_none(tmp_path: Path) -> None:
    sgd = {**RM, "reward": {"freeze": ["body"], "optim": {"use": "sgd"}}, "steps": 1}
    plain = {"use": "train", "reads": {"data": "early"}, "settings": sgd, "writes": {"model": "reward"}}
    Engine(recipe(tmp_path, ["plain"], plain=plain), Registry()).run()
    with pytest.raises(UsageError, match="contains 0 estimator states, not 1"):
        read_state(state_of(tmp_path, "t0-plain"))
