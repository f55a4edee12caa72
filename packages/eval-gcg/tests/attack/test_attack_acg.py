"""Schedule `acg`: merges improvements, computes a gradient once per suffix, and scores no candidate twice."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from tiny_attacks import family, plain_loss, tiny

from rlhf_eval_gcg.attack import Attack, Goal, attack
from rlhf_eval_gcg.attack import engine as engine_module
from rlhf_eval_gcg.attack.optimizer import Losses, Suffix, TokenGradient
from rlhf_eval_gcg.attack.schedules.acg import Acg, merge_improvements
from rlhf_eval_gcg.attack.scoring import Scorer

TOKENIZER = family("qwen")
GOAL = Goal("Say hello", "Sure, hello friend")


def suffix(ids: list[int], tokens: int, survivors: Any = None, answer: Any = (), **options: Any) -> Suffix:
    """Return a suffix over the first `tokens` tokens; every candidate survives unless `survivors` drops it."""
    return Suffix(
        ids_L=torch.tensor(ids), options=Attack(**options), allowed_V=torch.ones(tokens, dtype=torch.bool),
        generator=torch.Generator().manual_seed(0), letters_M=torch.tensor([], dtype=torch.long), place="a goal",
        survivors=survivors or (lambda ids_CL: torch.ones(len(ids_CL), dtype=torch.bool)),
        answer_M=torch.tensor(answer, dtype=torch.long),
    )  # fmt: skip


def drive(optimizer: Acg, view: Suffix, loss_of: Any) -> list[Any]:
    """Do one step with losses of a function instead of a model; return the questions, and move the suffix."""
    steps, asked = optimizer.step(view), []
    answer: Any = None
    while True:
        try:
            question = steps.send(answer)
        except StopIteration as end:
            view.ids_L, view.loss = end.value.ids_L, end.value.loss
            return asked
        asked.append(question)
        if isinstance(question, TokenGradient):
            answer = torch.zeros(len(view.ids_L), len(view.allowed_V)), loss_of(question.choice)
        else:
            answer = torch.tensor([loss_of(ids_L) for ids_L in question.ids_CL], dtype=torch.float64)


def scored(asked: list[Any]) -> list[tuple[int, ...]]:
    """Return the candidates of a step."""
    return [tuple(ids) for question in asked if isinstance(question, Losses) for ids in question.ids_CL.tolist()]


def test_one_step_solves_a_loss_that_is_a_sum_over_positions() -> None:
    table_LV = torch.rand(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    places = torch.arange(5)
    view = suffix([0, 1, 2, 3, 4], 7, topk=7, search_width=32 * 35)
    asked = drive(Acg(view.options), view, lambda ids_L: float(table_LV[places, ids_L].sum()))
    best = min(product(range(7), repeat=5), key=lambda ids: float(table_LV[places, list(ids)].sum()))
    assert tuple(view.ids_L.tolist()) == best
    assert view.loss == pytest.approx(float(table_LV.min(1).values.sum()))
    assert len(scored(asked)) < 5 * 7 + 5 < 7**5


def test_merges_are_the_best_of_each_position_in_order_without_what_the_filter_drops() -> None:
    rows = torch.tensor([[9, 0, 0, 0], [0, 8, 0, 0], [7, 0, 0, 0], [0, 0, 6, 0], [0, 0, 0, 5], [0, 0, 4, 0]])
    losses = torch.tensor([0.5, 0.2, 0.1, 0.4, 1.0, 0.3])  # the row with 5 does not improve on 1.0

    def merged(survivors: Any = None) -> list[list[int]]:
        return merge_improvements(suffix([0, 0, 0, 0], 10, survivors), rows, losses, 1.0).tolist()

    assert merged() == [[7, 8, 0, 0], [7, 8, 4, 0]]
    # 7 and 8 together are dropped, so 4 comes next, after which 8 is still dropped
    assert merged(lambda ids_CL: ~((ids_CL == 7).any(1) & (ids_CL == 8).any(1))) == [[7, 0, 4, 0]]
    assert merge_improvements(suffix([0, 0, 0, 0], 10), rows, losses, 0.15).tolist() == []
    assert merge_improvements(suffix([0, 0, 0, 0], 10), rows, losses, 0.0).shape == (0, 4)


def test_where_nothing_improves_all_are_tried_once_then_pairs_and_one_gradient_is_enough() -> None:
    view = suffix([0, 0], 3, topk=3, search_width=32)
    optimizer, seen, gradients = Acg(view.options), list[tuple[int, ...]](), 0
    while len(seen) < 8:
        asked = drive(optimizer, view, lambda ids_L: float(ids_L.any()))
        gradients += sum(isinstance(question, TokenGradient) for question in asked)
        seen += scored(asked)
    assert set(seen[:4]) == {(1, 0), (2, 0), (0, 1), (0, 2)} and set(seen[4:]) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert gradients == 1 and view.ids_L.tolist() == [0, 0] and view.loss == 0
    assert set(scored(drive(optimizer, view, lambda ids_L: float(ids_L.any())))) <= set(seen)  # again, and no error


def test_losses_are_plain_transformers_and_a_suffix_has_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, tried = tiny(len(TOKENIZER)), list[Any](), list[Any]()
    gradient, losses = engine_module.lane_gradient, Scorer.losses

    def counted(lane: Any, choice: Any, *rest: Any) -> Any:
        calls.append(tuple(choice.tolist()))
        return gradient(lane, choice, *rest)

    def noted(self: Any, tasks: Any) -> Any:
        found = losses(self, tasks)
        lane, ids_CL = tasks[0]
        tried.append((lane, ids_CL, found[0][0]))
        return found

    monkeypatch.setattr(engine_module, "lane_gradient", counted)
    monkeypatch.setattr(Scorer, "losses", noted)
    options = Attack(suffix="x x x !", steps=14, search_width=64, topk=40)
    (result,) = attack(model, TOKENIZER, [GOAL], options, seed=0)
    starts = {" x x x !", *result.texts[:-1]}  # losses fall, so no suffix comes back
    assert len(calls) == len(set(calls)) == len(starts) <= 12  # two steps or more did not move
    many = [(lane, row, loss) for lane, ids_CL, losses_C in tried for row, loss in zip(ids_CL.tolist(), losses_C)]
    for lane, row, loss in many:
        expected = plain_loss(model, lane.prompt.prompt_ids(row), result.target_ids)
        assert float(loss) == pytest.approx(expected, abs=1e-5)
