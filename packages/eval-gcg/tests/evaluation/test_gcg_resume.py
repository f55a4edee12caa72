"""A killed evaluation continues with the same suffixes, ranks share the work, and foreign attacks are never taken."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, RunStopped, UsageError
from rlhf_core.cli.app import main
from rlhf_core.testing import run_ranks, tiny_run
from rlhf_eval_gcg.attack import Attack, state
from rlhf_eval_gcg.evaluation import attackers
from rlhf_eval_gcg.evaluation.store import AttackStore, Unit, model_digest
from rlhf_eval_gcg.gcg import GCG

MODEL = "tiny:hidden=16,layers=1"
GOALS = (("Say hello.", "Hello, friend"), ("Count to three.", "One, two"), ("Name a fruit.", "A pear"))
SMALL: dict[str, Any] = {"goals": GOALS, "schedule": "gcg", "steps": 2, "search_width": 6, "n": 2}
COMMAND = [
    "eval", MODEL, "--evaluator", "gcg", "--evaluator.rows", ":3", "--evaluator.steps", "2", "--evaluator.search-width", "6",
    "--evaluator.n", "2", "--sampling.max-new-tokens", "3",
]  # fmt: skip


LONG = [*COMMAND, "--evaluator.steps", "5"]
"""The attack goes on for five steps."""


def attacks(output: Path) -> list[dict[str, Any]]:
    text = (output / "gcg/step-0/attacks.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def measure(output: Path, **options: Any) -> Run:
    run = tiny_run(output, model=MODEL, evaluator=GCG(**(SMALL | options)), steps=0)
    with run.open():
        run.measure()
    return run


class Killed(BaseException):
    """Stands for kill -9: nothing in between handles it."""


def kill_at(count: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the attack number `count` (from 0) be killed; return a function that gives the number of attacks."""
    original, made = attackers.attack, []

    def attack(*args: Any, **kwargs: Any) -> Any:
        if len(made) == count:
            raise Killed
        made.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(attackers, "attack", attack)
    return lambda: len(made)


def test_what_was_attacked_before_a_kill_is_not_attacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        with pytest.raises(Killed):
            measure(tmp_path / "killed")
    assert not (tmp_path / "killed/gcg/step-0/attacks.jsonl").exists()
    with monkeypatch.context() as patch:
        made = kill_at(-1, patch)
        measure(tmp_path / "killed")
        assert made() == 1
    assert attacks(tmp_path / "killed") == attacks(tmp_path / "whole")
    assert not (tmp_path / "killed/gcg/step-0/unfinished").exists()


def test_a_finished_evaluation_is_judged_again_without_an_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tmp_path)
    before = attacks(tmp_path)
    made = kill_at(-1, monkeypatch)
    measure(tmp_path, n=5, threshold=3.0)
    assert made() == 0
    assert attacks(tmp_path) == before
    measure(tmp_path, seeds=(0, 1))
    assert made() == 3, "the new seed alone"


def test_a_file_of_goals_may_be_moved_between_two_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("goal,target\nSay hello.,Hello\n", encoding="utf-8")
    measure(tmp_path / "out", goals=str(tmp_path / "a.csv"))
    made = kill_at(-1, monkeypatch)
    measure(tmp_path / "out", goals=str(tmp_path / "b.csv"))
    assert made() == 0


def test_attacks_with_other_options_are_not_mixed(tmp_path: Path) -> None:
    measure(tmp_path)
    path = tmp_path / "gcg/step-0/attacks.jsonl"
    store = AttackStore(path.parent, Attack(steps=3), "0")
    with pytest.raises(UsageError, match="contains attacks on another model or with other options"):
        store.check_same(run_trains=False)
    assert store.check_same(run_trains=True) is False
    assert attacks(tmp_path)


def test_what_decides_a_suffix_is_in_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(digest: str = "a", **options: Any) -> str:
        return AttackStore(tmp_path, Attack(**options), digest).fingerprint

    assert fingerprint() != fingerprint("b")
    assert fingerprint() != fingerprint(steps=3)
    assert fingerprint() == fingerprint(batch_tokens=7)


def test_the_digest_of_a_model_sees_one_bit_of_one_weight() -> None:
    layer = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    before = model_digest([layer])
    assert before == model_digest([layer])
    bits = layer.weight.data.view(torch.int16)
    bits[1, 2] ^= 1
    assert model_digest([layer]) != before


def test_a_damaged_file_of_an_unfinished_attack_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        with pytest.raises(Killed):
            measure(tmp_path)
    first, *_ = sorted((tmp_path / "gcg/step-0/unfinished").glob("*.json"))
    first.write_text("{", encoding="utf-8")
    made = kill_at(-1, monkeypatch)
    measure(tmp_path)
    assert made() == 2
    assert len(attacks(tmp_path)) == 3


def test_a_full_disk_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_eval_gcg.evaluation.store.write_text", fail)
    store = AttackStore(tmp_path, Attack(), "a")
    with pytest.raises(RunStopped, match="No space left on device; finished attacks are kept"):
        store.put(Unit((), 0), [])


def die(output: str, after: int) -> int:
    """Run the command in this process, and kill it -9 before attack number `after`."""
    original, made = attackers.attack, [0]

    def attack(*args: Any, **kwargs: Any) -> Any:
        if made[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        made[0] += 1
        return original(*args, **kwargs)

    attackers.attack = attack
    return main([*COMMAND, "--output", output])


@pytest.mark.slow
def test_kill_9_and_the_same_command_give_the_suffixes_of_a_whole_run(tmp_path: Path) -> None:
    (rank,) = run_ranks(1, die, str(tmp_path / "killed"), 2)
    assert rank.code == -signal.SIGKILL
    assert main([*COMMAND, "--output", str(tmp_path / "killed")]) == 0
    assert main([*COMMAND, "--output", str(tmp_path / "whole")]) == 0
    assert attacks(tmp_path / "killed") == attacks(tmp_path / "whole")


def die_inside(output: str, after: int) -> int:
    """Run the command in this process, and kill it -9 at a report of progress, in the middle of an attack."""
    reports = [0]

    def report(what: str, done: int = 0, total: int = 0) -> None:
        reports[0] += 1
        if reports[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    attackers.report = report  # type: ignore[attr-defined]
    state.INTERVAL_S = 0.0
    return main([*LONG, "--output", output])


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_attack_changes_no_suffix(tmp_path: Path) -> None:
    (rank,) = run_ranks(1, die_inside, str(tmp_path / "killed"), 9)
    assert rank.code == -signal.SIGKILL
    unfinished = [path.suffix for path in (tmp_path / "killed/gcg/step-0/unfinished").iterdir()]
    assert sorted(unfinished) == [".json", ".state"], "one attack was over, one in progress"
    assert main([*LONG, "--output", str(tmp_path / "killed")]) == 0
    assert main([*LONG, "--output", str(tmp_path / "whole")]) == 0
    assert attacks(tmp_path / "killed") == attacks(tmp_path / "whole")


def evaluate_ranks(output: str) -> int:
    """Evaluate in a run without steps, which is what ranks can do."""
    measure(Path(output))
    return 0


@pytest.mark.slow
def test_two_ranks_find_the_suffixes_and_answers_of_one(tmp_path: Path) -> None:
    done = run_ranks(2, evaluate_ranks, str(tmp_path / "two"))
    assert [rank.code for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    measure(tmp_path / "one")
    assert attacks(tmp_path / "two") == attacks(tmp_path / "one")
    one, two = ((tmp_path / name / "gcg/step-0/answers.jsonl").read_text(encoding="utf-8") for name in ("one", "two"))
    assert one == two


def test_a_kill_between_new_attacks_and_their_answers_leaves_no_answers_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_eval_gcg.evaluation import engine

    measure(tmp_path, goals=GOALS[:2])
    answers = tmp_path / "gcg/step-0/answers.jsonl"
    before = answers.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "ask", stop)
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path, goals=GOALS[:2])
        assert answers.read_bytes() == before, "the attacks are the same"
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path, goals=GOALS[1:])
    assert not answers.exists()


def stop(*args: Any) -> Any:
    raise KeyboardInterrupt
