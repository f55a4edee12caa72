"""Choosing among scored completions of a file: which rows are kept, and that generate, score and training chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_algos.advantage.best_of_n import BestOfNAdvantage
from rlhf_algos.advantage.pairs import PairsAdvantage
from rlhf_algos.data.selected import SelectedData
from rlhf_core.cli import main
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import DataError, UsageError
from rlhf_core.testing import check_data
from rlhf_core.testing.batches import make_batch

SCORES = {"a": [1.0, 3.0, 3.0, -1.0], "b": [2.0, 2.0], "c": [5.0], "d": [0.0, 0.5]}


def scored(folder: Path, **more: Any) -> str:
    """A file as `rlhf-run score` leaves it: completions are named after their prompt and their place."""
    path = folder / "scored.jsonl"
    rows = [{"prompt": p, "completion": f"{p}{k}", "reward": r} for p, rs in SCORES.items() for k, r in enumerate(rs)]
    path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return str(path)


def test_the_best_of_each_prompt_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    path = scored(tmp_path)
    assert [row.completions for row in SelectedData(path)("train")] == [("a1",), ("b0",), ("c0",), ("d1",)]
    check_data(SelectedData(path))


def test_a_pair_is_the_best_and_the_worst_and_equal_ones_are_none(tmp_path: Path) -> None:
    path = scored(tmp_path)
    assert [row.completions for row in SelectedData(path, select="pairs")("train")] == [("a1", "a3"), ("d1", "d0")]
    assert [row.completions for row in SelectedData(path, select="pairs", min_gap=0.5)("train")] == [("a1", "a3")]
    with pytest.raises(DataError, match="two completions that pairs selects as a pair with rewards more than 4 apart"):
        SelectedData(path, select="pairs", min_gap=4.0)("train")


@pytest.mark.parametrize(
    ("selector", "pairs"),
    [
        ("best_worst", [("a1", "a3"), ("d1", "d0")]),
        ("best_second", [("d1", "d0")]),
        ("best_second keep_ties=True", [("a1", "a2"), ("b0", "b1"), ("d1", "d0")]),
        ("best_quartile rank=3", [("a1", "a0")]),
        ("max_random", [("a1", "a0"), ("d1", "d0")]),
    ],
)
def test_a_pair_selector_chooses_in_a_file_as_among_samples(selector: str, pairs: list[Any], tmp_path: Path) -> None:
    data = SelectedData(scored(tmp_path), select="pairs", selector=selector)
    assert [row.completions for row in data("train")] == pairs


def test_a_file_may_hold_the_uncertainty_of_each_reward(tmp_path: Path) -> None:
    rows = [("x", 1.0, 0.1), ("y", 0.9, 0.1), ("z", 0.8, 2.0)]
    lines = [json.dumps({"prompt": "p", "completion": c, "reward": r, "std": s}) for c, r, s in rows]
    (tmp_path / "scored.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "scored.jsonl")
    data = SelectedData(path, select="pairs", selector="optimistic", uncertainty_key="std")
    assert [row.completions for row in data("train")] == [("x", "z")]
    with pytest.raises(UsageError, match="OptimisticPairs needs the uncertainty"):
        SelectedData(path, select="pairs", selector="optimistic")("train")


def test_prompts_are_held_out_whole(tmp_path: Path) -> None:
    """Held-out rows are drawn among what was chosen, one a prompt."""
    data = SelectedData(scored(tmp_path), heldout=1)
    train, heldout = ([row.completions[0] for row in data(split)] for split in ("train", "heldout"))
    assert sorted(train + heldout) == ["a1", "b0", "c0", "d1"]
    assert len(heldout) == 1


def test_files_and_samples_are_chosen_from_alike(tmp_path: Path) -> None:
    """The advantages `best_of_n` and `pairs` choose the same rows among samples."""
    names = [f"{p}{k}" for p, rs in SCORES.items() for k in range(len(rs))]
    groups = [i for i, rs in enumerate(SCORES.values()) for _ in rs]
    rewards = RewardOutput(torch.tensor([r for rs in SCORES.values() for r in rs]))
    rollouts = make_batch([1] * len(names), groups=groups)
    for select, advantage in (("best", BestOfNAdvantage()), ("pairs", PairsAdvantage())):
        rows = SelectedData(scored(tmp_path), select=select)("train")  # type: ignore[arg-type]
        indices = advantage(rewards, rollouts, {}).rows.tolist()  # type: ignore[attr-defined]
        assert [name for row in rows for name in row.completions] == [names[i] for i in indices]


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="limit must be at least 0"):
        SelectedData("x", limit=-1)
    for selector, message in (
        ("rloo", "'rloo' does not choose pairs"),
        ("best_wurst", "best_worst"),
        ("drts x=1", "no option 'x'"),
    ):
        with pytest.raises(UsageError, match=message):
            SelectedData(scored(tmp_path), select="pairs", selector=selector).check()
    with pytest.raises(DataError, match=r"scored.jsonl:1: expected a column 'score'"):
        SelectedData(scored(tmp_path), reward_key="score")("train")
    with pytest.raises(DataError, match="expected one completion"):
        SelectedData(scored(tmp_path, chosen="x", rejected="y"))("train")


def test_generate_score_and_train_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(
        "def reward_func(completions):\n    return [sum(map(ord, text)) for text in completions]\n"
    )
    model = ["--model", "tiny:hidden=32,layers=1"]
    few = ["--prompts", "4", "--sampling.n", "3", "--sampling.max-new-tokens", "4"]
    assert main(["generate", *model, *few]) == 0
    assert main(["score", "completions.jsonl", "--reward", "func", "--reward.path", "reward.py"]) == 0
    selected = [*model, "--data", "selected", "--data.path", "completions.scored.jsonl", "--batch-size", "1"]
    assert main(["sft", *selected, "--steps", "1", "--output", "best"]) == 0
    assert main(["dpo", *selected, "--data.select", "pairs", "--steps", "1", "--output", "pairs"]) == 0
    assert json.loads(Path("pairs/metrics.jsonl").read_text())["loss/actor"] == pytest.approx(0.6931, abs=1e-3)
