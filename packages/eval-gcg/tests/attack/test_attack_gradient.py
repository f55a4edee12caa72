"""The token gradient is autograd's through one-hot rows times the table, and that of finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lanes import lane
from tiny_attacks import SIZE, family, tiny
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from rlhf_eval_gcg.attack import Attack, Goal
from rlhf_eval_gcg.attack.gradient import batch_gradients, lane_gradient
from rlhf_eval_gcg.attack.losses import answer_losses
from rlhf_eval_gcg.attack.scoring import Scorer


def loss_of(made: Any, options: Any, onehot_LV: torch.Tensor, answer: tuple[int, ...], kind: str) -> torch.Tensor:
    """Return the loss of plain transformers for a mixture of tokens."""
    model = made.victim.model
    embed = model.get_input_embeddings()
    tail = torch.cat([made.after_A, torch.tensor(answer[:-1], dtype=torch.long)])
    before, after = embed(made.before_P), embed(tail)
    table_VH = embed(torch.arange(embed.num_embeddings))
    rows = torch.cat([before, onehot_LV.to(table_VH) @ table_VH, after])
    logits = model(inputs_embeds=rows[None]).logits[:, -len(answer) :]
    return answer_losses(logits, torch.tensor([answer]), kind, options.mellowmax_alpha, options.cw_margin)[0]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["cross_entropy", "mellowmax", "cw"])
def test_it_is_autograds_through_the_one_hot_rows(kind: str, cached: bool) -> None:
    made, options = lane(loss=kind, cached=cached)
    ids_L = torch.tensor(made.prompt.suffix_ids)
    onehot_LV = torch.nn.functional.one_hot(ids_L, made.victim.vocabulary).float().requires_grad_(True)
    loss = loss_of(made, options, onehot_LV, made.prompt.answers[0], kind)
    (expected_LV,) = torch.autograd.grad(loss, onehot_LV)
    found_LV, found, _ = lane_gradient(made, ids_L, made.victim.vocabulary, options)
    assert found == pytest.approx(float(loss.detach()), abs=1e-5)
    torch.testing.assert_close(found_LV, expected_LV, atol=1e-4, rtol=1e-4)


def test_it_is_that_of_finite_differences() -> None:
    made, options = lane(model=tiny(len(family("qwen")), initializer_range=0.1).double())
    ids_L = torch.tensor(made.prompt.suffix_ids)
    found_LV, _, _ = lane_gradient(made, ids_L, made.victim.vocabulary, options)
    onehot_LV = torch.nn.functional.one_hot(ids_L, made.victim.vocabulary).double()
    with torch.no_grad():
        for place, token in [(0, 3), (1, 77), (3, 200), (2, int(ids_L[2]))]:
            step = torch.zeros_like(onehot_LV)
            step[place, token] = 1e-2  # layers that round to float32 allow no smaller one
            up, down = (
                loss_of(made, options, onehot_LV + sign * step, made.prompt.answers[0], "cross_entropy").double()
                for sign in (1, -1)
            )
            assert float(found_LV[place, token]) == pytest.approx(float((up - down) / 2e-2), abs=1e-4)


def test_a_table_that_the_model_scales_is_scaled() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=len(family("gemma")), head_dim=8, sliding_window=512, **SIZE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    made, options = lane("gemma", model=model)
    ids_L = torch.tensor(made.prompt.suffix_ids)
    onehot_LV = torch.nn.functional.one_hot(ids_L, made.victim.vocabulary).float().requires_grad_(True)
    loss = loss_of(made, options, onehot_LV, made.prompt.answers[0], "cross_entropy")
    (expected_LV,) = torch.autograd.grad(loss, onehot_LV)
    found_LV, _, _ = lane_gradient(made, ids_L, made.victim.vocabulary, options)
    torch.testing.assert_close(found_LV, expected_LV, atol=1e-4, rtol=1e-3)


def test_of_a_bad_set_it_is_that_of_the_summed_probability() -> None:
    goal = Goal("Say hello", "Sure, hello", bad_set=("Yes", "No. 12"))
    made, options = lane(goal=goal, objective="bad_set")
    ids_L = torch.tensor(made.prompt.suffix_ids)
    onehot_LV = torch.nn.functional.one_hot(ids_L, made.victim.vocabulary).float().requires_grad_(True)
    sums = [loss_of(made, options, onehot_LV, answer, "likelihood") for answer in made.prompt.answers]
    loss = -(-torch.stack(sums)).logsumexp(0)
    (expected_LV,) = torch.autograd.grad(loss, onehot_LV)
    found_LV, found, _ = lane_gradient(made, ids_L, made.victim.vocabulary, options)
    assert len(sums) == 3 and found == pytest.approx(float(loss.detach()), abs=1e-4)
    torch.testing.assert_close(found_LV, expected_LV, atol=1e-4, rtol=1e-3)


def test_of_a_mixture_of_tokens_it_is_autograds_too() -> None:
    made, options = lane()
    weights_LV = torch.rand(4, made.victim.vocabulary, generator=torch.Generator().manual_seed(0)).softmax(1)
    leaf = weights_LV.clone().requires_grad_(True)
    loss = loss_of(made, options, leaf, made.prompt.answers[0], "cross_entropy")
    (expected_LV,) = torch.autograd.grad(loss, leaf)
    found_LV, found, _ = lane_gradient(made, weights_LV, made.victim.vocabulary, options)
    assert found == pytest.approx(float(loss.detach()), abs=1e-5)
    torch.testing.assert_close(found_LV, expected_LV, atol=1e-4, rtol=1e-3)
    assert made.base_L is None  # no suffix of tokens is there to share


def test_lanes_of_several_lengths_have_their_own_gradients_in_one_batch() -> None:
    model = tiny(len(family("qwen"))).double()
    goals = [
        Goal("Say hello", "Sure, hello friend"),
        Goal("Write a long poem about the sea, please", "Yes"),
        Goal("Hi", "The capital of France is Paris."),
    ]
    apart, together = ([lane(goal=goal, model=model)[0] for goal in goals] for _ in range(2))
    options = Attack(suffix="x x x !")
    for each in together:
        each.victim = together[0].victim
    draw = torch.Generator().manual_seed(0)
    choices = [torch.randint(50, (4,), generator=draw) for _ in goals]
    expected = [lane_gradient(each, ids_L, 60, options) for each, ids_L in zip(apart, choices, strict=True)]
    found = batch_gradients(together, choices, 60, options)
    for (gradient_LV, loss, flops), (expected_LV, expected_loss, expected_flops) in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient_LV, expected_LV, atol=1e-6, rtol=1e-5)
        assert (loss, flops) == (pytest.approx(expected_loss, abs=1e-6), expected_flops)
    for one, other in zip(together, apart, strict=True):  # candidates of the step share the suffix
        assert one.base_L is not None and one.base_L.tolist() == other.base_L.tolist()
        for (k, v), (expected_k, expected_v) in zip(one.base.layers, other.base.layers, strict=True):
            torch.testing.assert_close(k, expected_k, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(v, expected_v, atol=1e-6, rtol=1e-5)


def test_only_what_may_be_in_one_pass_is_in_one_batch() -> None:
    made = [lane()[0] for _ in range(3)]
    for each in made:
        each.victim = made[0].victim
    several, _ = lane(goal=Goal("Hi", "Yes", bad_set=("No",)), objective="bad_set")
    several.victim = made[0].victim
    other, _ = lane()
    ids_L = torch.tensor(made[0].prompt.suffix_ids)
    tasks = [(k, each, ids_L) for k, each in enumerate([*made, made[0], several, other])]

    def cut(scorer: Scorer) -> list[list[int]]:
        return [[place for place, _, _ in batch] for batch in scorer.gradient_batches(tasks)]

    assert cut(Scorer(Attack(), mixes=True)) == [[0, 1, 2], [3], [4], [5]]
    assert cut(Scorer(Attack(batch_tokens=1), mixes=True)) == [[k] for k in range(6)]
    assert cut(Scorer(Attack())) == [[k] for k in range(6)]  # a CPU pays for padding
