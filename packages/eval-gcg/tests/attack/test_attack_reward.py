"""Objective `reward`: answers of low reward become likelier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_attacks import family, tiny

from rlhf_core.errors import UsageError
from rlhf_eval_gcg.attack import Attack, AttackPrompt, Goal, attack
from rlhf_eval_gcg.attack.reward_objective import leave_one_out

TOKENIZER = family("qwen")
OPTIONS: dict[str, Any] = {
    "suffix": "x x x !", "objective": "reward", "reward_samples": 16, "sample_tokens": 2, "schedule": "gcg", "search_width": 32,
}  # fmt: skip


def letters(prompts: list[str], answers: list[str]) -> list[float]:
    """Reward answers without an `e`."""
    return [0.0 if "e" in answer else 1.0 for answer in answers]


def exact(model: object, prompt_ids: tuple[int, ...]) -> float:
    """Return the mean reward by enumeration of all answers of one token."""
    with torch.no_grad():
        probs_V = model(torch.tensor([prompt_ids])).logits[0, -1].softmax(-1)  # type: ignore[operator]
    texts = [TOKENIZER.decode([token], skip_special_tokens=True) for token in range(len(probs_V))]
    return float(probs_V @ torch.tensor(letters([], texts)))


def initial_prompt() -> tuple[int, ...]:
    """Return the prompt with the suffix that the search begins with."""
    prompt = AttackPrompt.build(Goal("Say hello"), TOKENIZER, Attack(suffix="x x x !", objective="reward"))
    return prompt.prompt_ids(prompt.suffix_ids)


def test_the_baseline_is_the_mean_of_the_others() -> None:
    assert leave_one_out([1.0, 2.0, 6.0]) == [1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5]


def test_the_mean_reward_falls_as_enumeration_says() -> None:
    model = tiny(len(TOKENIZER))
    options = Attack(**(OPTIONS | {"sample_tokens": 1, "reward_samples": 64, "steps": 8}))
    (result,) = attack(model, TOKENIZER, [Goal("Say hello")], options, seed=0, rewards=letters)
    assert result.loss == min(result.losses) and result.target_ids == () and not result.matched
    before = exact(model, initial_prompt())
    after = exact(model, result.prompt_ids)
    assert after < before - 0.05
    assert result.initial_loss == pytest.approx(before, abs=0.2)  # 64 samples
    assert result.loss == pytest.approx(after, abs=0.25)


def test_it_is_seeded_and_reads_messages_and_answers() -> None:
    model, seen = tiny(len(TOKENIZER)), []

    def watch(prompts: list[str], answers: list[str]) -> list[float]:
        seen.append((prompts, answers))
        return letters(prompts, answers)

    options = Attack(**(OPTIONS | {"steps": 2}))
    goal = Goal("Say hello", "Sure")
    one, again = (attack(model, TOKENIZER, [goal], options, seed=5, rewards=watch) for _ in range(2))
    assert one == again
    prompts, answers = seen[0]
    assert prompts == ["Say hello x x x !"] * 17 and answers[-1] == "Sure"  # the target joins the samples
    assert seen[-1][0][0] == one[0].goal.goal + one[0].texts[-1]


@pytest.mark.parametrize("wrong", [[1.0], [float("nan")] * 16])
def test_a_reward_that_is_no_number_for_each_answer_is_one_line(wrong: list[float]) -> None:
    options = Attack(**(OPTIONS | {"steps": 1}))
    with pytest.raises(UsageError, match="must be one finite number per answer"):
        attack(tiny(len(TOKENIZER)), TOKENIZER, [Goal("Say hello")], options, seed=0, rewards=lambda p, a: wrong)
