"""Engine states in checkpoints: a resumed run continues as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_core.checkpoint import valid_checkpoints
from rlhf_core.cli import main
from rlhf_core.testing import run_ranks
from rlhf_core.util.tensor_tree import read_tree

HERE = Path(__file__).parent
TIMED = ("time/", "speed/", "memory/")
WORDS = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", "tiny:hidden=16,layers=1", "--batch-size", "4"]
WORDS += ["--sampling.max-new-tokens", "6", "--actor.optim.lr", "1e-2", "--eval-every", "1"]
WORDS += ["--data", "remembering:Wandering", "--reward", "remembering:Novelty", "--advantage", "remembering:Smoothed"]
WORDS += ["--evaluator", "remembering:Times", "--observer", "remembering:Diary"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def run(ranks: int, output: Path, *flags: str) -> None:
    """The command on one process, here, or on several ranks."""
    words = [*WORDS, "--output", str(output), *flags]
    if ranks == 1:
        assert main(words) == 0
        return
    done = run_ranks(ranks, main, words)
    assert not any(rank.code for rank in done), done[-1].stderr[-3000:]


def metrics(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def states(output: Path, rank: int) -> dict[str, object]:
    folder = valid_checkpoints(output)[-1] / "providers" / f"rank-{rank}"
    return {path.name.removesuffix(".safetensors"): str(read_tree(path)) for path in folder.iterdir()}


@pytest.mark.parametrize("flags", [(), ("--save-async",)], ids=["in the loop", "in the background"])
def test_a_resumed_run_with_states_of_every_kind_equals_a_straight_one_bit_for_bit(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(1, straight, "--steps", "5", *flags)
    run(1, resumed, "--steps", "2", *flags)
    run(1, resumed, "--steps", "3", "--resume", *flags)
    run(1, resumed, "--steps", "5", "--resume", *flags)
    assert metrics(resumed) == metrics(straight)
    assert [row["eval/times"] for row in metrics(straight)] == [2, 3, 4, 5, 6], "the first one is before the first step"
    assert (resumed / "diary.txt").read_text() == (straight / "diary.txt").read_text()
    weights = [load_file(output / "model" / "model.safetensors") for output in (straight, resumed)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert states(resumed, 0) == states(straight, 0)
    names = {"advantage.actor", "data", "evaluator.remembering%3ATimes", "observer.remembering%3ADiary", "reward"}
    assert set(states(straight, 0)) == names


def test_each_of_two_ranks_continues_from_its_own_state_and_one_rank_refuses_to_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for output, *flags in (
        (straight, "--steps", "4"),
        (resumed, "--steps", "2"),
        (resumed, "--steps", "4", "--resume"),
    ):
        run(2, output, *flags)
    assert metrics(resumed) == metrics(straight)
    assert states(resumed, 1) == states(straight, 1)
    assert states(straight, 0)["reward"] != states(straight, 1)["reward"], "each rank has seen other completions"
    assert states(straight, 0)["data"] == states(straight, 1)["data"], "and all have read the same rows"
    assert "observer.remembering%3ADiary" not in states(straight, 1), "which the leader alone has"
    assert main([*WORDS, "--output", str(resumed), "--steps", "5", "--resume"]) == 2
    error = capsys.readouterr().err
    assert "a separate state of reward for each of 2 ranks, which 1 ranks cannot share" in error
