"""`generate` and `score` find where to continue line by line, whatever wrote the lines, and remember a few bytes of each."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli.generate import Generate
from rlhf_core.cli.resumable import append_lines, continue_output, whole_lines
from rlhf_core.cli.score import Score
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import UsageError
from rlhf_core.reward.length import Length


def line(uid: int, k: int = 0) -> dict[str, Any]:
    return {
        "uid": uid,
        "k": k,
        "prompt": f"{uid}?",
        "text": f"{uid}?",
        "completion": "yes",
        "tokens": 3,
        "finish": "stop",
    }


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
def test_finished_rows_are_those_with_every_completion(tmp_path: Path, separators: tuple[str, str]) -> None:
    """Row 3 was too long, row 7 lacks a completion, and the last line is half; all of them are to be asked again."""
    path = tmp_path / "out.jsonl"
    whole = [json.dumps(line(uid, k), separators=separators) + "\n" for uid in (1, 5) for k in (0, 1)]
    path.write_text("".join(whole) + json.dumps(line(7)) + "\n" + json.dumps(line(7, 1))[:20])
    done = Generate(shard="1/2", sampling=Sampling(n=2))._finished_rows(path)
    assert [row in done for row in range(5)] == [True, False, True, False, False]
    assert done.lines == 4
    assert path.read_text() == "".join(whole)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(0)], "another --shard or --sampling.n"),
        ([line(1), line(1, 1), line(1, 2)], "another --shard or --sampling.n"),
        ([{"k": 1}], "is not a file of this command"),
        ([[1]], "is not a file of this command"),
        ([line(-1)], "is not a file of this command"),
        ([line(2**40 + 1)], "is not a file of this command"),
    ],
)
def test_lines_of_something_else_are_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(UsageError, match=message):
        Generate(shard="1/2", sampling=Sampling(n=2))._finished_rows(path)


def test_a_restart_of_generate_remembers_a_few_bytes_a_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line(uid)) + "\n" for uid in range(20_000)))
    tracemalloc.start()
    try:
        done = Generate()._finished_rows(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.lines == 20_000
    assert peak < 16 * 20_000 + 100_000  # 4 bytes a row, twice while the array grows


class Counting(Length):
    """Length, and how many completions were scored."""

    seen: list[int] = []

    def __call__(self, rollouts: Rollouts) -> Any:
        self.seen.append(len(rollouts))
        return super().__call__(rollouts)


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
def test_score_continues_behind_the_lines_that_have_a_reward(
    tmp_path: Path, separators: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """However the file is written: the output has the blanks of Python's JSON."""
    file, path, reward = tmp_path / "in.jsonl", tmp_path / "out.jsonl", Counting()
    file.write_text("\n" + "".join(json.dumps(line(uid), separators=separators) + "\n\n" for uid in range(9)))
    score = Score(str(file), output=str(path), batch_size=4)
    Counting.seen.clear()
    continue_output(path, reward=reward, seed=0)
    append_lines(path, [line(uid) | {"reward": 0.5} for uid in range(3)])
    assert score._score(reward, reward) == 0
    assert Counting.seen == [4, 4, 1]  # the batch that was cut short is scored again
    assert capsys.readouterr().out == f"9 rewards in {path}\n"
    assert [json.loads(each)["uid"] for each in whole_lines(path)] == list(range(9))
    assert score._score(reward, reward) == 0
    assert Counting.seen == [4, 4, 1]
    changed = file.read_text().replace("yes", "no!", 5)
    file.write_text(changed)
    with pytest.raises(UsageError, match=r"out\.jsonl:1 does not belong to .*in\.jsonl:1;"):
        score._score(reward, reward)
