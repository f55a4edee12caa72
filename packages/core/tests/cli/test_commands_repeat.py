"""`score`, `generate` and `eval` give the same numbers twice though a reward or a reader draws, also after a kill."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_core.cli import main
from rlhf_core.contract.batch import Example, Rollouts
from rlhf_core.contract.providers import Data, Reward

TINY = "--model tiny:hidden=8,layers=1 --sampling.n 1 --sampling.max-new-tokens 2"
LINES = 7


def draw() -> float:
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


@dataclass(frozen=True)
class Noise(Reward):
    """Rewards are noise."""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [draw() for _ in rollouts.texts]


@dataclass(frozen=True)
class NoisyRows(Data):
    """Rows are noise, too."""

    def __call__(self, split: str) -> Iterable[Example]:
        return NoisyStream()


class NoisyStream(Iterable[Example]):
    def __iter__(self) -> Iterator[Example]:
        return (Example(f"{draw()}") for _ in range(LINES))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    rows = [{"prompt": f"{number}", "completion": "a"} for number in range(LINES)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(words: str, output: str) -> list[str]:
    draw()  # whatever was drawn before the command
    assert main([*words.split(), "--output", output]) == 0
    return Path(output).read_text().splitlines()


SCORE = f"score rows.jsonl --reward {__name__}:Noise --batch-size 3"
GENERATE = f"generate {TINY} --data {__name__}:NoisyRows --batch-size 3"


@pytest.mark.parametrize("words", [SCORE, GENERATE])
def test_a_command_repeats_also_after_a_kill(words: str) -> None:
    whole = lines(words, "whole")
    assert len(whole) == LINES
    assert lines(words, "again") == whole
    assert lines(f"{words} --seed 1", "other") != whole
    assert [lines(words, "again"), len(set(whole))] == [whole, LINES], "finished lines stay, and each draws anew"
    for left in (1, 3, 4, 6):  # lines of a batch that was being written
        Path("again").write_text("".join(f"{line}\n" for line in whole[:left]) + whole[left][:9])
        assert lines(words, "again") == whole, left


def test_an_evaluation_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate(seed: int) -> str:
        draw()
        words = f"eval tiny:hidden=8,layers=1 --evaluator heldout --reward {__name__}:Noise --data {__name__}:NoisyRows"
        assert main([*words.split(), "--sampling.max-new-tokens", "2", "--seed", str(seed)]) == 0
        return capsys.readouterr().out

    assert evaluate(0) == evaluate(0) != evaluate(1)


def test_a_score_with_another_seed_is_not_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    lines(SCORE, "scored")
    assert main([*SCORE.split(), "--output", "scored", "--seed", "1"]) == 2
    assert "scored was started with another --seed" in capsys.readouterr().err
