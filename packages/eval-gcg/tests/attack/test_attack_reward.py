"""Objective `reward`: answers of low reward become likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_attacks import family, tiny

from rlhf_core.errors import UsageError
from rlhf_eval_gcg.attack import Attack, AttackPrompt, Goal, JudgedAnswer, attack
from rlhf_eval_gcg.attack.reward_objective import leave_one_out

TOKENIZER = family("qwen")
OPTIONS: dict[str, Any] = {
    "suffix": "x x x !", "objective": "reward", "reward_samples": 16, "sample_tokens": 2, "schedule": "gcg", "search_width": 32,
}  # fmt: skip


def letters(answers: Sequence[JudgedAnswer]) -> list[float]:
    """Reward answers without an `e`."""
    return [without_e(answer.text) for answer in answers]


def without_e(text: str) -> float:
    return 0.0 if "e" in text else 1.0


def exact(model: object, prompt_ids: tuple[int, ...]) -> float:
    """Return the mean reward by enumeration of all answers of one token."""
    with torch.no_grad():
        probs_V = model(torch.tensor([prompt_ids])).logits[0, -1].softmax(-1)  # type: ignore[operator]
    texts = [TOKENIZER.decode([token], skip_special_tokens=True) for token in range(len(probs_V))]
    return float(probs_V @ torch.tensor([without_e(text) for text in texts]))


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

    def watch(answers: Sequence[JudgedAnswer]) -> list[float]:
        seen.append(answers)
        return letters(answers)

    options = Attack(**(OPTIONS | {"steps": 2}))
    goal = Goal("Say hello", "Sure")
    one, again = (attack(model, TOKENIZER, [goal], options, seed=5, rewards=watch) for _ in range(2))
    assert one == again
    assert [answer.message for answer in seen[0]] == ["Say hello x x x !"] * 17
    assert seen[0][-1].text == "Sure" and not seen[0][-1].cut  # the target joins the samples
    assert seen[-1][0].message == one[0].goal.goal + one[0].texts[-1]


@pytest.mark.parametrize("judge_suffix", [True, False])
def test_a_judge_reads_the_tokens_that_were_sampled_and_those_of_its_prompt(judge_suffix: bool) -> None:
    """Texts with tokens of several bytes: a count of bytes or characters differs from that of tokens."""
    model, seen = tiny(len(TOKENIZER)), []

    def watch(answers: Sequence[JudgedAnswer]) -> list[float]:
        seen.extend(answers)
        return [float(len(answer.ids)) for answer in answers]

    options = Attack(**(OPTIONS | {"steps": 1, "sample_tokens": 4}))
    attack(model, TOKENIZER, [Goal("Say hello", "Sure")], options, seed=0, rewards=watch, judge_suffix=judge_suffix)
    first = seen[0]
    plain = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": first.message}], add_generation_prompt=True, tokenize=False
    )
    assert first.message == ("Say hello x x x !" if judge_suffix else "Say hello")
    assert first.prompt == plain and list(first.prompt_ids) == TOKENIZER(plain, add_special_tokens=False)["input_ids"]
    end = TOKENIZER.eos_token_id
    for answer in seen[:16]:
        assert answer.text == TOKENIZER.decode(list(answer.ids), skip_special_tokens=True)
        assert end not in answer.ids[:-1] and answer.cut == (answer.ids[-1] != end)
        assert len(answer.ids) == 4 or not answer.cut
    assert any(len(answer.ids) != len(answer.text.encode()) for answer in seen)


@pytest.mark.parametrize("wrong", [[1.0], [float("nan")] * 16])
def test_a_reward_that_is_no_number_for_each_answer_is_one_line(wrong: list[float]) -> None:
    options = Attack(**(OPTIONS | {"steps": 1}))
    with pytest.raises(UsageError, match="must be one finite number per answer"):
        attack(tiny(len(TOKENIZER)), TOKENIZER, [Goal("Say hello")], options, seed=0, rewards=lambda answers: wrong)
