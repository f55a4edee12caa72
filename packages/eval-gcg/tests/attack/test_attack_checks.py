"""Mistakes in a suffix optimizer of a plugin: one line that names the schedule and states the rule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_attacks import family, tiny

from rlhf_core.errors import OptionError, UsageError
from rlhf_eval_gcg.attack import Attack, Goal, attack
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient

TOKENIZER = family("qwen")
V = len(TOKENIZER)


def searched(schedule: str, **options: Any) -> Any:
    chosen = Attack(suffix="x x x !", steps=1, search_width=4, schedule=schedule, **options)
    return attack(tiny(V), TOKENIZER, [Goal("Say hello", "Sure")], chosen, seed=0)


class Given:
    """Asks a question, and returns a move, as the case says."""

    ask: Callable[[Suffix], Any]
    end: Callable[[Suffix], Any]

    def __init__(self, options: Attack) -> None:
        self.options = options

    def step(self, suffix: Suffix) -> Any:
        yield type(self).ask(suffix)
        return type(self).end(suffix)


def rows(suffix: Suffix) -> torch.Tensor:
    return suffix.ids_L[None]


def stay(suffix: Suffix) -> Move:
    return Move(suffix.ids_L, 1.0)


def remember(suffix: Suffix, value: Any) -> Move:
    suffix.memory["seen"] = value
    return stay(suffix)


QUESTIONS: dict[str, tuple[Callable[[Suffix], Any], str]] = {
    "no question": (lambda s: s.ids_L, "asks for Tensor; a suffix optimizer yields TokenGradient or Losses"),
    "one candidate": (
        lambda s: Losses(s.ids_L),
        r"gives Losses.ids_CL as torch.int64 \(\d+,\); .* of the shape \(C, \d+\)",
    ),
    "short candidates": (lambda s: Losses(rows(s)[:, 1:]), r"gives Losses.ids_CL as torch.int64 \(1, \d+\); token ids"),
    "floats": (lambda s: Losses(rows(s).float()), r"gives Losses.ids_CL as torch.float32"),
    "a list": (lambda s: Losses(rows(s).tolist()), r"gives Losses.ids_CL as list; token ids"),
    "beyond the vocabulary": (
        lambda s: Losses(rows(s) * 0 + len(s.allowed_V)),
        r"tokens (\d+) to \1, of a vocabulary of \1",
    ),
    "a negative token": (lambda s: Losses(rows(s) * 0 - 1), "with tokens -1 to -1, of a vocabulary of"),
    "no draft": (lambda s: Losses(rows(s), by_draft=True), "asks a draft model for losses, and there is none"),
    "a narrow mixture": (
        lambda s: TokenGradient(torch.ones(len(s.ids_L), 3)),
        r"weights torch.float32 \(\d+, 3\); a mixture",
    ),
    "a gradient of rows": (lambda s: TokenGradient(rows(s)), r"gives TokenGradient.choice as torch.int64 \(1, \d+\)"),
}
MOVES: dict[str, tuple[Callable[[Suffix], Any], str]] = {
    "nothing": (lambda _: None, r"returned NoneType at the end of a step; return Move\(ids_L, loss\)"),
    "a shorter suffix": (
        lambda s: Move(s.ids_L[1:], 1.0),
        r"gives Move.ids_L as torch.int64 \(\d+,\); .* shape \(\d+,\)",
    ),
    "a list": (lambda s: Move(s.ids_L.tolist(), 1.0), "gives Move.ids_L as list"),
    "a loss that is a tensor": (lambda s: Move(s.ids_L, torch.ones(1)), r"Move.loss as Tensor; write a number"),  # type: ignore[arg-type]
    "a memory of lists": (lambda s: remember(s, [1]), r"keeps 'seen' in suffix.memory as list; keep tensors"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_a_question_that_has_no_answer_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, message = QUESTIONS[case]
    monkeypatch.setattr(Given, "ask", staticmethod(ask), raising=False)
    monkeypatch.setattr(Given, "end", staticmethod(stay), raising=False)
    with pytest.raises(UsageError, match=rf"^schedule '{__name__}:Given' .*{message}"):
        searched(f"{__name__}:Given")


@pytest.mark.parametrize("case", MOVES)
def test_a_step_that_ends_wrongly_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end, message = MOVES[case]
    monkeypatch.setattr(Given, "ask", staticmethod(lambda s: Losses(rows(s))), raising=False)
    monkeypatch.setattr(Given, "end", staticmethod(end), raising=False)
    with pytest.raises(UsageError, match=rf"^schedule '{__name__}:Given' .*{message}"):
        searched(f"{__name__}:Given")


def test_candidates_of_none_and_a_memory_of_tensors_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Given, "ask", staticmethod(lambda s: Losses(rows(s)[:0])), raising=False)
    monkeypatch.setattr(Given, "end", staticmethod(lambda s: remember(s, torch.ones(2))), raising=False)
    (result,) = searched(f"{__name__}:Given")
    assert result.losses == (1.0,)


class Hasty:
    """Moves without a question."""

    def __init__(self, options: Attack) -> None:
        self.options = options

    def step(self, suffix: Suffix) -> Move:
        return stay(suffix)


class Idle(Hasty):
    """Has a yield that is never reached."""

    def step(self, suffix: Suffix) -> Any:
        return stay(suffix)
        yield


class Bare:
    """Takes no options."""

    def step(self, suffix: Suffix) -> Any:
        yield


class Stepless:
    def __init__(self, options: Attack) -> None:
        self.options = options


def test_a_class_that_is_no_optimizer_is_named() -> None:
    with pytest.raises(UsageError, match=rf"schedule '{__name__}:Hasty': step\(\) yields no question"):
        searched(f"{__name__}:Hasty")
    with pytest.raises(
        OptionError, match=rf"schedule '{__name__}:Bare' must be a class that takes the options: .*argument"
    ):
        searched(f"{__name__}:Bare")
    with pytest.raises(OptionError, match=rf"schedule '{__name__}:Stepless' has no method step"):
        searched(f"{__name__}:Stepless")
    (result,) = searched(f"{__name__}:Idle")
    assert result.losses == (1.0,)


def test_a_module_of_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script has its own folder on the path, and not the working folder."""
    (tmp_path / "beside_me.py").write_text(
        "from rlhf_eval_gcg.attack.schedules.gcg import Gcg\n\n\nclass Search(Gcg):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert searched("beside_me:Search")[0].losses == searched("gcg")[0].losses
