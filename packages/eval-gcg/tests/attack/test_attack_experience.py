"""Chances that `acg` learns from losses, of positions and sources: formulas in plain Python, and additive losses."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
from test_attack_acg import TOKENIZER, drive, scored, suffix
from tiny_attacks import tiny

from rlhf_eval_gcg.attack import Attack, AttackPrompt, Goal
from rlhf_eval_gcg.attack.candidates import Chances, replace_tokens
from rlhf_eval_gcg.attack.optimizer import Move, Suffix
from rlhf_eval_gcg.attack.schedules.acg import Acg
from rlhf_eval_gcg.attack.schedules.experience import (
    KEPT,
    LEAST,
    follow_move,
    note_losses,
    place_chances,
    token_chances,
)
from rlhf_eval_gcg.attack.search import make_search
from rlhf_eval_gcg.attack.victim import Victim

ROWS = torch.tensor([[1, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 5, 0], [0, 0, 6, 0]])


def test_before_any_loss_all_positions_and_sources_are_equal() -> None:
    view = suffix([0, 0, 0, 0], 9)
    assert place_chances(view).tolist() == [1, 1, 1, 1]
    weights = token_chances(view, 2, 3).tolist()
    assert weights == pytest.approx([1 / 4, 1 / 4, 3 / 11, 3 / 22, 1 / 11])  # 1 : 1/2 : 1/3 in the second half
    assert token_chances(view, 0, 3).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])


def test_the_chance_of_a_position_is_that_of_a_normal_change_below_zero() -> None:
    view = suffix([0, 0, 0, 0], 9)
    note_losses(view, ROWS, torch.tensor([0.9, 1.2, 1.4, 0.7, 0.9, 0.8], dtype=torch.float64), 1.0)
    changes = [[-0.1, 0.2], [0.4], [-0.3, -0.1, -0.2], []]
    mean = sum(map(sum, changes)) / 6
    means = [(sum(own) + mean) / (len(own) + 1) for own in changes]
    variance = sum((x - center) ** 2 for own, center in zip(changes, means) for x in own) / 6
    expected = [
        NormalDist(center, (variance * (1 + 1 / (len(own) + 1))) ** 0.5).cdf(0) for own, center in zip(changes, means)
    ]
    assert place_chances(view).tolist() == pytest.approx(expected)
    assert expected[2] > expected[3] > expected[0] > expected[1] > LEAST


def test_no_position_is_given_up() -> None:
    view = suffix([0, 0, 0, 0], 9)
    note_losses(view, ROWS, torch.tensor([9.0, 9.1, 0.5, 0.4, 0.5, 0.6]), 1.0)
    assert float(place_chances(view)[0]) == LEAST


def test_a_change_is_shared_by_the_positions_that_a_candidate_replaces() -> None:
    pairs, singles = suffix([0, 0], 9), suffix([0, 0], 9)
    note_losses(pairs, torch.tensor([[1, 2]]), torch.tensor([1.5]), 1.0)
    note_losses(singles, torch.tensor([[1, 0], [0, 2]]), torch.tensor([1.25, 1.25]), 1.0)
    assert torch.equal(pairs.memory["changes_3L"], singles.memory["changes_3L"])


def test_sources_share_the_draws_by_their_rates_of_improvement() -> None:
    view = suffix([0, 0, 0, 0], 9, answer=[4, 5, 6])
    note_losses(view, ROWS, torch.tensor([0.9, 1.2, 1.4, 0.7, 0.9, 1.0]), 1.0)
    gradient, answers = (1 + 1) / (3 + 2), (2 + 1) / (3 + 2)  # one of three, and two of three, improve
    weights = token_chances(view, 3, 2)
    assert weights[:3].tolist() == pytest.approx([answers / (gradient + answers) / 3] * 3)
    assert weights[3:].tolist() == pytest.approx([gradient / (gradient + answers) * share for share in (2 / 3, 1 / 3)])
    mixed = suffix([0, 0], 9, answer=[4])  # a candidate with one token of the answer and another is no quotation
    note_losses(mixed, torch.tensor([[4, 1]]), torch.tensor([0.5]), 1.0)
    assert mixed.memory["sources_22"].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("moved", [[2, 0, 0, 0], [2, 3, 0, 0], [1, 3, 6, 0]])
def test_where_losses_add_up_a_move_leaves_what_the_next_suffix_would_measure(moved: list[int]) -> None:
    values = {(0, 1): -0.1, (0, 2): -0.3, (1, 3): -0.2, (2, 4): 0.4, (2, 5): 0.1, (2, 6): -0.05}

    def loss_of(ids: Any) -> float:
        return 1 + sum(values.get((place, token), 0.0) for place, token in enumerate(ids))

    view = suffix([0, 0, 0, 0], 9)
    losses_C = torch.tensor([loss_of(ids) for ids in ROWS.tolist()], dtype=torch.float64)
    note_losses(view, ROWS, losses_C, 1.0)
    follow_move(view, ROWS, losses_C, 1.0, Move(torch.tensor(moved), loss_of(moved)))
    after = [[*moved[:place], token, *moved[place + 1 :]] for place, token in values]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for (place, _), ids in zip(values, after, strict=True):
        change = loss_of(ids) - loss_of(moved)
        expected[:, place] += torch.tensor([1.0, change, change**2], dtype=torch.float64)
    torch.testing.assert_close(view.memory["changes_3L"], KEPT * expected)


def test_draws_follow_the_chances() -> None:
    view = suffix([0, 0, 0], 9)
    tops_LK = torch.tensor([[1, 2], [3, 4], [5, 6]])
    chances = Chances(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.75, 0.25]))
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(4000):
        row = tuple(replace_tokens(view, tops_LK, 1, 1, view.ids_L[None], chances)[0].tolist())
        seen[row] = seen.get(row, 0) + 1
    for place, weight in enumerate((0.6, 0.3, 0.1)):
        for pick, share in enumerate((0.75, 0.25)):
            row = [0, 0, 0]
            row[place] = int(tops_LK[place, pick])
            assert seen[tuple(row)] / 4000 == pytest.approx(weight * share, abs=0.03)
    assert all((row != 0).sum() == 2 for row in replace_tokens(view, tops_LK, 5, 2, view.ids_L[None], chances))


def test_a_position_where_replacements_harm_is_tried_least() -> None:
    """The loss rises by 1 at positions 0 to 3, and is random at the others."""
    table_LV = torch.rand(8, 200, generator=torch.Generator().manual_seed(0)) - 0.5
    table_LV[:4] = 1.0
    table_LV[:, 0] = 0.0
    view = suffix([0] * 8, 200, topk=200, search_width=128)
    optimizer, tried_L = Acg(view.options), torch.zeros(8)
    for _ in range(12):
        start_L = view.ids_L
        for row in scored(drive(optimizer, view, lambda ids_L: float(table_LV[torch.arange(8), ids_L].sum()))):
            tried_L += torch.tensor(row) != start_L
    assert tried_L.sum() > 40 and tried_L[4:].sum() > 2 * tried_L[:4].sum()


def test_tokens_of_the_answer_are_drawn_unless_quote_is_off() -> None:
    """The gradient's best 3 tokens of 300 are 0, 1 and 2, and only token 250, which the answer has, improves."""

    def searched(quote: bool) -> tuple[Suffix, set[int]]:
        view = suffix([0] * 4, 300, answer=[250, 251], topk=3, search_width=32, quote=quote)
        optimizer, tokens = Acg(view.options), set[int]()
        for _ in range(8):
            for row in scored(drive(optimizer, view, lambda ids_L: 9 - float((ids_L == 250).sum()))):
                tokens |= set(row)
        return view, tokens

    quoting, tokens = searched(True)
    assert quoting.loss == 5 and tokens >= {250, 251}
    plain, tokens = searched(False)
    assert plain.loss == 9 and tokens == {0, 1, 2}


@pytest.mark.parametrize(
    ("objective", "texts"),
    [("target", ["Yes, hello"]), ("bad_set", ["Yes, hello", "No. 12"]), ("reward", [])],
)
def test_the_answer_is_what_the_objective_aims_at(objective: Any, texts: list[str]) -> None:
    options = Attack(suffix="x x", objective=objective)
    goal = Goal("Say hello", "Yes, hello", bad_set=("No. 12",))
    model = tiny(len(TOKENIZER))
    allowed_V = torch.ones(len(TOKENIZER), dtype=torch.bool)
    first = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
    if first:
        allowed_V[first[0][0]] = False
    prompts = [AttackPrompt.build(goal, TOKENIZER, options)]
    letters = torch.tensor([], dtype=torch.long)
    search = make_search([0], prompts, [Victim(model)], None, (allowed_V, letters), options, 0, 0)
    expected = dict.fromkeys(token for ids in first for token in ids if allowed_V[token])
    assert search.suffix.answer_M.tolist() == list(expected)
