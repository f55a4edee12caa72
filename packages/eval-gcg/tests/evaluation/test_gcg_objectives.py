"""Objectives, drafts, further models and several goals at once, as a user of the evaluator chooses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import OptionError
from rlhf_core.testing import tiny_run
from rlhf_eval_gcg.attack import Goal, attack
from rlhf_eval_gcg.evaluation import attackers
from rlhf_eval_gcg.evaluation.attackers import make_units
from rlhf_eval_gcg.gcg import GCG

MODEL = "tiny:hidden=16,layers=1"
GOALS = (("Say hello.", "Hello, friend"), ("Count to three.", "One, two"), ("Name a fruit, or two.", "A pear"))
SMALL: dict[str, Any] = {"goals": GOALS[:1], "schedule": "gcg", "steps": 2, "search_width": 40, "n": 2}


def evaluate(output: Path, **options: Any) -> list[dict[str, Any]]:
    """Measure an untrained model; return its attacks."""
    run = tiny_run(output, model=MODEL, evaluator=GCG(**(SMALL | options)), steps=0)
    with run.open():
        run.measure()
    text = (output / "gcg/step-0/attacks.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_objective_reward_records_the_mean_reward_of_the_judge(tmp_path: Path) -> None:
    always, never = (
        evaluate(tmp_path / word, objective="reward", judge=f"regex pattern={pattern}", sample_tokens=3)[0]
        for word, pattern in (("always", ".*"), ("never", "(?!)"))
    )
    assert always["losses"] == [1.0, 1.0], "every answer is worth 1"
    assert (never["losses"], never["initial_loss"]) == ([0.0, 0.0], 0.0)
    assert always["steps"] == 2 and not always["matched"]


def test_objective_reward_uses_the_runs_reward_where_there_is_no_judge(tmp_path: Path) -> None:
    (row,) = evaluate(tmp_path, objective="reward", sample_tokens=3)
    assert all(-1 <= loss < 0 for loss in row["losses"]), (
        "answers of 3 tokens are too short for the run's reward, length"
    )


def test_a_draft_saves_candidates_of_the_policy(tmp_path: Path) -> None:
    (plain,) = evaluate(tmp_path / "plain")
    (probed,) = evaluate(tmp_path / "probed", schedule="probe", draft=MODEL)
    # a draft that is the policy itself agrees with it wholly: a 16th are probes, and one is its favorite
    assert probed["candidates"] <= 2 * (40 // 16 + 1) < plain["candidates"]
    assert min(probed["losses"]) <= probed["initial_loss"]


def test_a_suffix_for_the_same_model_twice_is_that_for_one(tmp_path: Path) -> None:
    (one,) = evaluate(tmp_path / "one")
    (two,) = evaluate(tmp_path / "two", more_models=(MODEL,))
    assert two["texts"] == one["texts"]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert two["flops"] == pytest.approx([2 * flops for flops in one["flops"]])


@pytest.mark.parametrize("options", [{"draft": "other", "schedule": "probe"}, {"more_models": ("other",)}])
def test_a_model_with_another_tokenizer_is_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_core.models.loading import tokenizer

    load = tokenizer.load_tokenizer

    def other(name: str, chosen: Any) -> Any:
        found = load(MODEL, chosen)
        if name == "other":
            found.add_tokens("<new>")
        return found

    monkeypatch.setattr(tokenizer, "load_tokenizer", other)
    with pytest.raises(OptionError, match="other: its tokenizer differs from the policy's"):
        evaluate(tmp_path, **options)
    run = tiny_run(tmp_path / "end", model=MODEL, evaluator=GCG(**(SMALL | options), end_only=True))
    with pytest.raises(OptionError, match="other: its tokenizer differs from the policy's"):
        run.train()
    assert run.step == 0, "a user waits for no training that cannot be evaluated"


@pytest.mark.parametrize("together", [2, 3, 8])
def test_goals_and_seeds_that_are_attacked_together_have_the_suffixes_of_each_alone(
    together: int, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"goals": GOALS, "seeds": (0, 5), "schedule": "acg", "restarts": 2, "search_width": 8}
    alone = evaluate(tmp_path / "alone", **chosen)
    assert evaluate(tmp_path / "together", **chosen, goals_at_once=together) == alone
    assert len({row["text"] for row in alone}) > 2


def test_calls_hold_as_many_goals_as_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(model: Any, tokenizer: Any, goals: list[Goal], *args: Any, **rest: Any) -> Any:
        calls.append(len(goals))
        return attack(model, tokenizer, goals, *args, **rest)

    monkeypatch.setattr(attackers, "attack", counted)
    evaluate(tmp_path / "pairs", goals=GOALS, seeds=(0, 5), goals_at_once=4)
    evaluate(tmp_path / "pairs", goals=GOALS, seeds=(0, 5), goals_at_once=4)
    assert calls == [4, 2], "what is known is not attacked again"
    calls.clear()
    evaluate(tmp_path / "transfer", goals=GOALS, seeds=(0, 5), goals_at_once=4, transfer=True)
    assert calls == [3, 3], "one suffix for all goals is a call of its own"
    assert len(make_units(GCG(**(SMALL | {"goals": GOALS})).read(), (0, 5), False)) == 6


def test_a_call_that_was_killed_continues_with_the_same_suffixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_eval_gcg.attack import state

    monkeypatch.setattr(state, "INTERVAL_S", 0.0)
    chosen: dict[str, Any] = {"goals": GOALS, "steps": 4, "search_width": 8, "goals_at_once": 3}
    whole = evaluate(tmp_path / "whole", **chosen)
    save = state.StateFile.save
    saved: list[bool] = []

    def killed(self: Any, searches: Any, force: bool = False) -> None:
        save(self, searches, force)
        saved.append(True)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state.StateFile, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path / "killed", **chosen)
    (left,) = (tmp_path / "killed/gcg/step-0/unfinished").glob("*.state")
    assert left.stat().st_size > 0
    assert evaluate(tmp_path / "killed", **chosen) == whole


@pytest.mark.parametrize("suffix", [True, False])
def test_objective_reward_shows_the_judge_what_it_is_shown_after_the_attack(
    suffix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_eval_gcg.judges.refusal import Refusal

    shown: list[Any] = []

    def judge(self: Refusal, rollouts: Any) -> list[float]:
        shown.append([each["prompt"] for each in rollouts.meta])
        return [float(len(text)) for text in rollouts.texts]

    monkeypatch.setattr(Refusal, "__call__", judge)
    chosen: dict[str, Any] = {"objective": "reward", "judge": "refusal", "sample_tokens": 3, "system": "Be kind."}
    (row,) = evaluate(tmp_path, **chosen, judge_suffix=suffix)
    during, after = shown[0][0], shown[-1][0]
    assert [message["role"] for message in during] == [message["role"] for message in after] == ["system", "user"]
    assert after[1]["content"] == (row["message"] if suffix else row["goal"])
    assert during[1]["content"] == row["goal"] + (" x x x x x x x x x x" if suffix else "")


def test_another_judge_of_objective_reward_attacks_again(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"objective": "reward", "sample_tokens": 3}
    (always,) = evaluate(tmp_path, **chosen, judge="regex pattern=.*")
    (never,) = evaluate(tmp_path, **chosen, judge="regex pattern=(?!)")
    assert (always["losses"], never["losses"]) == ([1.0, 1.0], [0.0, 0.0])
    (blind,) = evaluate(tmp_path, **chosen, judge="regex pattern=(?!)", judge_suffix=False)
    assert len({always["fingerprint"], never["fingerprint"], blind["fingerprint"]}) == 3
    aimed = [evaluate(tmp_path / "aimed", judge=f"regex pattern={each}")[0]["fingerprint"] for each in (".*", "(?!)")]
    assert aimed[0] == aimed[1], "a suffix that makes a target likely does not follow from the judge"
