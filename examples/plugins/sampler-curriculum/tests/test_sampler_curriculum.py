"""The rule is that of a slow one in plain Python, scores change the very next step, and runs are the same resumed and on two
ranks."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from rlhf_core import UsageError
from rlhf_core.testing import check_light, check_sampler
from rlhf_sampler_curriculum.curriculum import Curriculum

RANKS = Path(__file__).with_name("curriculum_ranks.py")
sys.path.append(str(RANKS.parent))
import curriculum_ranks  # noqa: E402  the module that the ranks run


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/", "memory/"))} for row in rows]


def rows_by_step(folder: Path) -> dict[int, list[int]]:
    """The rows of each step in the order of the batch, two completions each."""
    found: dict[int, list[int]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        found.setdefault(sample["step"], []).append(sample["row"])
    return found


def test_it_keeps_the_contract() -> None:
    check_light("rlhf_sampler_curriculum.plugin", "rlhf_sampler_curriculum.curriculum")
    drawn = check_sampler(Curriculum())
    assert set(drawn) == set(range(11)), "every row comes in time"
    check_sampler(Curriculum(decay=1.0, rate=1.0, target=0.9), rows=3)
    with pytest.raises(UsageError, match=r"rate.* must be above 0 and at most 1, not 0"):
        Curriculum(rate=0)


@pytest.mark.parametrize("options", [Curriculum(), Curriculum(target=0.8, unseen=0.05, rate=0.3, decay=0.7)])
def test_the_next_row_is_that_of_the_rule(options: Curriculum) -> None:
    """The rule again, row by row in Python's float64, over random scores and batches."""
    chance, rows = random.Random(5), 9
    engine = options.open(None)
    drawn = engine(rows, 3)
    order = np.random.default_rng(3).permutation(rows).tolist()
    mean: dict[int, float] = {}
    scored = dict.fromkeys(range(rows), 0)
    waiting: set[int] = set()
    for update in range(40):
        batch = []
        for _ in range(chance.randint(1, 5)):
            if len(waiting) == rows:
                waiting.clear()
            far = {
                number: (abs(mean[number] - options.target) if number in mean else options.unseen)
                * options.decay ** (update - scored[number])
                for number in order
                if number not in waiting
            }
            best = min(far, key=lambda number: far[number])  # the first of equals, in the order of the permutation
            assert next(drawn) == best
            batch.append(best)
            waiting.add(best)
        told = batch[: chance.randint(1, len(batch))]  # the others were too long
        scores = {number: [chance.random() for _ in range(3)] for number in told}
        pairs = [(number, score) for number, values in scores.items() for score in values]
        chance.shuffle(pairs)
        engine.update(torch.tensor([n for n, _ in pairs]), torch.tensor([s for _, s in pairs], dtype=torch.float64))
        for number, values in scores.items():
            new = statistics.fmean(values)
            mean[number] = mean[number] + options.rate * (new - mean[number]) if number in mean else new
            scored[number] = update + 1
            waiting.discard(number)
        known = [mean.get(number, float("nan")) for number in order]
        assert engine.mean_R.tolist() == pytest.approx(known, rel=1e-12, nan_ok=True)


def test_scores_change_the_very_next_step(tmp_path: Path) -> None:
    """Two steps see all eight rows; then come the four whose scores are nearest 0.5, since no distance is below `unseen`."""
    options = Curriculum(unseen=0.0, decay=1.0)
    curriculum_ranks.run(tmp_path, sampler=options, output=str(tmp_path / "run"), steps=4)
    rows = rows_by_step(tmp_path / "run")
    assert sorted(rows[1] + rows[2]) == list(range(8))
    assert rows[3][0] == 1, "its score is 0.5"
    assert set(rows[3][1:3]) == {3, 4}, "their scores are 0.25 and 0.75"
    assert rows[3] == rows[4]
    eager = Curriculum(unseen=0.3, decay=1.0)
    curriculum_ranks.run(tmp_path, sampler=eager, output=str(tmp_path / "eager"), steps=2)
    first, second = rows_by_step(tmp_path / "eager").values()
    good = [number for number in first if abs(curriculum_ranks.SCORES[number] - 0.5) < 0.3]
    assert good and set(good) <= set(second), "what was good in step 1 comes again in step 2"
    assert not set(first) - set(good) & set(second)


@dataclass(frozen=True)
class AheadByOne(Curriculum):
    """The curriculum with a batch drawn ahead."""

    lookahead: ClassVar[int] = 1


def test_a_step_is_late_by_the_batches_that_are_drawn_ahead(tmp_path: Path) -> None:
    """With eight rows in two steps, step 3 is drawn after the scores of step 1, and step 4 after those of step 2."""
    ahead = AheadByOne(unseen=0.0, decay=1.0)
    curriculum_ranks.run(tmp_path, sampler=ahead, output=str(tmp_path / "run"), steps=4)
    found = [number for step in rows_by_step(tmp_path / "run").values() for number in step]
    engine = ahead.open(None)
    numbers = engine(8, 0)
    batches = [list(islice(numbers, 4)) for _ in range(2)]
    for step in range(2):
        row_N = torch.tensor(batches[step])
        engine.update(row_N, torch.tensor([curriculum_ranks.SCORES[n] for n in batches[step]], dtype=torch.float64))
        batches.append(list(islice(numbers, 4)))
    assert found == [number for batch in batches for number in batch]


@pytest.mark.parametrize("options", [Curriculum(), AheadByOne()], ids=lambda each: type(each).__name__)
def test_a_resumed_run_equals_a_straight_one(tmp_path: Path, options: Curriculum) -> None:
    curriculum_ranks.run(tmp_path, sampler=options, output=str(tmp_path / "straight"))
    curriculum_ranks.run(tmp_path, sampler=options, output=str(tmp_path / "run"), steps=3)
    curriculum_ranks.run(tmp_path, sampler=options, output=str(tmp_path / "run"), resume=True)
    assert rows_by_step(tmp_path / "run") == rows_by_step(tmp_path / "straight")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    curriculum_ranks.run(tmp_path, output=str(tmp_path / "one"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, RANKS, tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "ranks"), strict=True):
        for name in ("reward/row1", "reward/row2", "reward/row3"):
            assert two[name] == one[name], "the same rows"
        assert two["loss/actor"] == pytest.approx(one["loss/actor"], rel=1e-3, abs=1e-4)
