"""Beginning or continuing with one command, and the file of evaluations, which grows as they happen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf_core.config.builder import parse
from rlhf_core.contract.providers import Evaluator
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import Registry
from rlhf_core.run.run import Run
from rlhf_core.testing import tiny_run

MODEL = "tiny:hidden=16,layers=1"


@dataclass(frozen=True)
class Steps(Evaluator):
    """The number of finished steps."""

    samples: ClassVar[bool] = False

    def __call__(self, run: Any) -> Mapping[str, float]:
        return {"steps": float(run.step)}


def lines(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def test_resume_auto_begins_and_continues(tmp_path: Path) -> None:
    for steps in (2, 2, 3):  # begun, found complete, and continued
        tiny_run(tmp_path, model=MODEL, steps=steps, resume="auto", save_every=1).train()
        assert [line["step"] for line in lines(tmp_path, "metrics.jsonl")] == list(range(1, steps + 1))
    assert parse(["--config", str(tmp_path / "config.toml")], Registry()).resume is False
    with pytest.raises(UsageError, match="began with other options: seed=… 0 -> 1"):
        tiny_run(tmp_path, model=MODEL, steps=3, seed=1, resume="auto").train()


def test_resume_auto_continues_after_a_start_that_wrote_no_step(tmp_path: Path) -> None:
    first = tiny_run(tmp_path, model=MODEL, seed=7)
    with first.folder.open():  # as a run that was killed while it loaded
        pass
    tiny_run(tmp_path, model=MODEL, resume="auto").train()  # with another seed: nothing was trained with that one
    assert len(lines(tmp_path, "metrics.jsonl")) == 2


@pytest.mark.parametrize(("words", "value"), [([], True), (["auto"], "auto"), (["false"], False)])
def test_resume_is_a_switch_or_auto(words: list[str], value: object) -> None:
    flags = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", MODEL, "--resume", *words]
    assert parse(flags, Registry()).resume == value
    with pytest.raises(UsageError, match="--resume expects True|False|{auto}, not 'perhaps'"):
        parse([*flags[:4], "perhaps"], Registry())


def test_evaluations_are_written_when_they_happen_and_taken_from_the_checkpoint(tmp_path: Path) -> None:
    seen: list[int] = []

    def run_of(**options: Any) -> Run:
        return tiny_run(tmp_path, model=MODEL, steps=4, evaluator=[Steps()], eval_every=1, save_every=2, **options)

    killed = run_of()
    finish = killed.finish

    def die_in_step_4(iteration: Any, credited: Any) -> None:
        seen.append(len(lines(tmp_path, "evaluation-metrics.jsonl")))
        if iteration.step == 4:
            raise KeyboardInterrupt
        finish(iteration, credited)

    killed.finish = die_in_step_4  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert seen == [1, 2, 3, 4], "the baseline, and one more after every step"
    run_of(resume=True).train()
    found = lines(tmp_path, "evaluation-metrics.jsonl")
    assert [line["step"] for line in found] == [line["eval/steps"] for line in found] == [0, 1, 2, 3, 4]
