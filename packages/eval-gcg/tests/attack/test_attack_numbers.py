"""Numbers of the attack that results hide: the meter backward, buffers, momentum, drafts, means over goals, draws."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from test_attack_acg import suffix
from tiny_attacks import family, plain_loss, tiny
from torch.utils.flop_counter import FlopCounterMode

from rlhf_eval_gcg.attack import Attack, AttackPrompt, Goal, attack
from rlhf_eval_gcg.attack.candidates import replace_tokens
from rlhf_eval_gcg.attack.flops import Costs
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient
from rlhf_eval_gcg.attack.schedules.momentum import remember
from rlhf_eval_gcg.attack.schedules.pool import settle
from rlhf_eval_gcg.attack.schedules.probe import Probe

TOKENIZER = family("qwen")
VOCAB = len(TOKENIZER)
SMALL: dict[str, Any] = {"suffix": "x x x !", "steps": 3, "search_width": 8, "topk": 40}


@pytest.mark.parametrize(("new", "past"), [(5, 0), (3, 7)])
def test_attention_alone_costs_what_torch_counts_for_its_products(new: int, past: int) -> None:
    """Two products forward; each has two backward, since queries, keys and values all need a gradient."""
    heads, channels = 3, 4
    query, key, value = (torch.randn(heads, n, channels, requires_grad=True) for n in (new, past + new, past + new))
    costs = Costs(parameters=0, linear=0, head=0, attention=heads * channels)
    with FlopCounterMode(display=False) as forward:
        answer = (query @ key.transpose(1, 2)).softmax(-1) @ value
    with FlopCounterMode(display=False) as backward:
        answer.sum().backward()
    assert costs.forward(2, new, past, 1) == 2 * forward.get_total_flops()
    assert costs.backward(2, new, past, 1) == 2 * backward.get_total_flops()


def test_where_the_width_is_the_number_of_replacements_all_are_taken() -> None:
    tops_LK = torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = replace_tokens(suffix([0, 0, 0], 9), tops_LK, 6, 1, torch.tensor([[0, 0, 0]]))
    assert found.tolist() == [[1, 0, 0], [2, 0, 0], [0, 3, 0], [0, 4, 0], [0, 0, 5], [0, 0, 6]]


def test_momentum_is_the_running_mean_of_gradients() -> None:
    view = suffix([0], 2)
    gradients = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]]), torch.tensor([[8.0, 8.0]])]
    means = [remember(view, each, 0.75).tolist() for each in gradients]
    assert means == [[[4.0, 0.0]], [[3.0, 2.0]], [[4.25, 3.5]]]


def settled(pool: list[float], candidate: float, size: int) -> tuple[list[float], Move]:
    """The losses of a buffer after a candidate, and the move; suffixes are named by their losses."""
    view = suffix([0], 99, buffer=size, schedule="gcg")
    view.memory["pool_KL"] = torch.tensor(pool).long()[:, None]
    view.memory["pool_losses_K"] = torch.tensor(pool)
    ids_CL = torch.tensor([[90], [int(candidate)]])
    move = settle(view, ids_CL, torch.tensor([90.0, candidate]))
    assert view.memory["pool_KL"][:, 0].tolist() == view.memory["pool_losses_K"].tolist()
    return view.memory["pool_losses_K"].tolist(), move


def test_a_candidate_takes_the_place_of_the_worst_in_the_buffer_though_it_is_not_the_best() -> None:
    losses, move = settled([5.0, 1.0], 3.0, 2)
    assert losses == [3.0, 1.0] and (move.ids_L.tolist(), move.loss) == ([1], 1.0)
    losses, move = settled([5.0, 1.0], 7.0, 2)
    assert losses == [5.0, 1.0] and move.loss == 1.0, "one that is worse than all stays out"
    losses, move = settled([5.0, 1.0], 7.0, 3)
    assert losses == [5.0, 1.0, 7.0] and move.loss == 1.0, "a buffer with room takes any"


@pytest.mark.parametrize(("order", "favorites"), [(1, 1), (-1, 4)])
def test_the_better_a_draft_agrees_the_fewer_of_its_favorites_are_scored(order: int, favorites: int) -> None:
    """32 candidates: one favorite where ranks agree wholly, an eighth of all where they are reversed."""
    view = suffix([0] * 8, 50, topk=4, search_width=32)  # all of 8 * 4 replacements
    view.has_draft, view.allowed_V[0] = True, False
    steps = Probe(view.options).step(view)
    question = next(steps)
    assert isinstance(question, TokenGradient)
    drafted = steps.send((torch.randn(8, 50, generator=torch.Generator().manual_seed(1)), 1.0))
    assert isinstance(drafted, Losses) and drafted.by_draft and len(drafted.ids_CL) == 32
    drafts_C = torch.arange(32.0)
    loss_of = {tuple(ids): float(draft) for ids, draft in zip(drafted.ids_CL.tolist(), drafts_C, strict=True)}
    probes = steps.send(drafts_C)
    assert isinstance(probes, Losses) and len(probes.ids_CL) == 2
    scored = torch.tensor([order * loss_of[tuple(ids)] for ids in probes.ids_CL.tolist()])
    others = steps.send(scored)
    assert isinstance(others, Losses)
    assert others.ids_CL.tolist() == drafted.ids_CL[:favorites].tolist()


class Watch:
    """Writes down the gradient of the first suffix."""

    def __init__(self, options: Attack) -> None:
        self.options = options

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        gradient_LV, loss = yield TokenGradient(suffix.ids_L)
        SEEN.append((gradient_LV, loss))
        return Move(suffix.ids_L, loss)


SEEN: list[tuple[torch.Tensor, float]] = []


def test_the_gradient_of_a_suffix_for_all_goals_is_the_mean_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(VOCAB)
    goals = [Goal("Say hello", "Sure, hello friend"), Goal("Write a poem", "Yes. No."), Goal("Say hello", "No.")]
    options = SMALL | {"steps": 1, "schedule": f"{__name__}:Watch"}
    SEEN.clear()
    for goal in goals:
        attack(model, TOKENIZER, [goal], Attack(**options), seed=0)
    attack(model, TOKENIZER, goals, Attack(**options, transfer=True), seed=0)
    *apart, (together_LV, loss) = SEEN
    torch.testing.assert_close(together_LV, torch.stack([each for each, _ in apart]).mean(0), atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(sum(each for _, each in apart) / 3)


def test_a_suffix_for_all_goals_has_matched_only_where_every_goal_has() -> None:
    """The first target is a token that greedy decoding gives anyway; the second is one that it does not give."""
    model = tiny(VOCAB)
    prompt = AttackPrompt.build(Goal("Say hello", "Sure"), TOKENIZER, Attack(**SMALL))
    losses = [plain_loss(model, prompt.prompt_ids(prompt.suffix_ids), [token]) for token in range(VOCAB)]
    likely, unlikely = losses.index(min(losses)), losses.index(max(losses))
    goals = [Goal("Say hello", TOKENIZER.decode([token])) for token in (likely, unlikely)]
    options = Attack(**SMALL, schedule="gcg", early_stop=True, transfer=True)
    alone = attack(model, TOKENIZER, goals[:1], options, seed=0)
    assert len(alone[0].losses) == 1 and alone[0].matched
    both = attack(model, TOKENIZER, goals, options, seed=0)
    assert [len(each.losses) for each in both] == [3, 3] and not both[1].matched


def test_equal_goals_of_one_attack_are_searched_with_other_draws() -> None:
    options = Attack(**SMALL, schedule="gcg")
    first, second = attack(tiny(VOCAB), TOKENIZER, [Goal("Say hello", "Sure")] * 2, options, seed=0)
    assert first.initial_loss == pytest.approx(second.initial_loss) and first.losses != second.losses
