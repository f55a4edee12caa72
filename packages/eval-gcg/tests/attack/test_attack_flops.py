"""The meter of operations against torch's own counter, and against the convention of papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_attacks import family, tiny
from torch.utils.flop_counter import FlopCounterMode

from rlhf_eval_gcg.attack import Attack, Goal, attack
from rlhf_eval_gcg.attack.flops import Costs

TOKENIZER = family("qwen")


def model(**size: Any) -> Any:
    made = tiny(len(TOKENIZER), **size)
    made.set_attn_implementation("eager")  # whose products torch counts on a CPU
    return made


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("schedule", ["gcg", "acg"])
def test_it_is_within_5_percent_of_torchs_counter(schedule: str, cached: bool) -> None:
    for victim in (model(), model(hidden_size=64, intermediate_size=200, num_hidden_layers=3)):
        options = Attack(
            suffix="x x x !", steps=3, search_width=16, schedule=schedule, prefix_cache=cached, system="You are kind."
        )
        goal = Goal("Say hello", "Sure, hello friend")
        (result,) = attack(victim, TOKENIZER, [goal], options, seed=0)
        with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
            # the comparison at the start and the look at the end are not the attack
            patch.setattr("rlhf_eval_gcg.attack.run._sharing_fault", lambda *_: "")
            patch.setattr("rlhf_eval_gcg.attack.search.greedy_match", lambda *_: False)
            (again,) = attack(victim, TOKENIZER, [goal], options, seed=0)
        assert again.flops == result.flops
        assert result.flops[-1] == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_convention_counts_2nt_forward_and_4nt_backward() -> None:
    victim = model()
    costs = Costs.measure(victim, "2nt")
    parameters = sum(weight.numel() for weight in victim.parameters())
    assert costs.forward(3, 5, 100, 2) == 2 * parameters * 15
    assert costs.backward(3, 5, 100, 2) == 4 * parameters * 15
    assert costs.over_tokens(4, 32, 100) == 0


def test_what_is_cached_is_not_counted() -> None:
    goal = Goal("Say hello " * 10, "Sure")
    chosen: dict[str, Any] = {"suffix": "x x x !", "steps": 2, "search_width": 16, "schedule": "gcg"}
    flops = [
        attack(model(), TOKENIZER, [goal], Attack(**chosen, prefix_cache=cached, flop_rule="2nt"), seed=0)[0].flops[-1]
        for cached in (True, False)
    ]
    assert flops[0] < 0.6 * flops[1]


def test_logits_are_kept_at_the_answer_alone() -> None:
    victim = model()
    head, rows = victim.lm_head, []
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    options = Attack(suffix="x x x !", steps=1, search_width=16, schedule="gcg")
    (result,) = attack(victim, TOKENIZER, [Goal("Say hello", "Sure, hello friend")], options, seed=0)
    assert set(rows) <= {1, len(result.target_ids), len(result.prompt_ids) + len(result.target_ids) - 1}
    assert rows.count(len(result.target_ids)) >= 3
    assert torch.is_grad_enabled()


def test_sampled_answers_cost_as_much_for_each_row() -> None:
    victim = model()
    options = Attack(
        suffix="x x x !", steps=2, search_width=4, schedule="gcg", objective="reward", reward_samples=6, sample_tokens=5
    )
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr("rlhf_eval_gcg.attack.run._sharing_fault", lambda *_: "")
        patch.setattr("rlhf_eval_gcg.attack.search.greedy_match", lambda *_: False)
        (result,) = attack(
            victim,
            TOKENIZER,
            [Goal("Say hello")],
            options,
            seed=0,
            rewards=lambda answers: [len(each.text) for each in answers],
        )
    assert result.flops[-1] == pytest.approx(counter.get_total_flops(), rel=0.05)
