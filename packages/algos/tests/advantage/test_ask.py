"""Tests of `ask`: its choice of pairs, over ranks too, its state, and runs that train on no other pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_algos.advantage.ask import AskAdvantage, AskEngine
from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import Credit, RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch

MARGINS = [0.5, -3.0, 0.9, -1.2, 0.0, 2.0, 0.1, 0.3]
Z_BD = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Rank(World):
    """One of two ranks, which knows what the other one tells."""

    size = 2

    def __init__(self, rank: int, told: Any) -> None:
        self.rank, self.told = rank, told

    def gather(self, thing: Any) -> list[Any]:
        return [thing, self.told] if self.rank == 0 else [self.told, thing]


def given(
    pairs: slice = slice(None), step: int = 1, world: World | None = None
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """A batch of pairs with these margins and feature differences."""
    margins_B, z_BD = torch.tensor(MARGINS, dtype=torch.float64)[pairs], Z_BD[pairs]
    N = 2 * len(margins_B)
    batch = make_batch([2] * N, groups=[i // 2 for i in range(N)])
    scores_N = torch.stack([margins_B + 1, torch.ones(len(margins_B))], 1).flatten()
    features_NH = torch.stack([z_BD + 0.5, torch.full_like(z_BD, 0.5)], 1).flatten(0, 1)
    batch = replace(batch, step=StepInfo(number=step), world=world)
    return batch, {"reward.scores_N": scores_N, "reward.features_NH": features_NH}


def ask(engine: AskEngine, *arguments: Any) -> Credit:
    batch, extras = given(*arguments)
    return engine(RewardOutput(torch.zeros(len(batch))), batch, extras)


def pairs_of(credit: Credit) -> list[int]:
    """The numbers of the chosen pairs, whose rows must be adjacent and in order."""
    assert credit.rows is not None
    rows = credit.rows.tolist()
    assert rows[1::2] == [row + 1 for row in rows[0::2]]
    return [row // 2 for row in rows[0::2]]


@pytest.mark.parametrize(("by", "expected"), [("reward_diff", [1, 5]), ("margin", [2, 3]), ("closest", [4, 6])])
def test_the_pairs_with_the_largest_scores_are_asked(by: Any, expected: list[int]) -> None:
    assert pairs_of(ask(AskEngine(AskAdvantage(by=by)))) == expected
    assert pairs_of(ask(AskEngine(AskAdvantage(by=by, share=1.0)))) == list(range(8))


def test_uncertainty_is_the_norm_in_the_inverse_of_the_curvature_of_asked_pairs() -> None:
    """Against explicit matrices: two batches of the same pairs, the second one under what the first one taught."""
    engine = AskEngine(AskAdvantage(damping=0.5))
    matrix_DD = 0.5 * torch.eye(3, dtype=torch.float64)
    for _ in range(3):
        norms_B = torch.stack([z @ torch.linalg.solve(matrix_DD, z) for z in Z_BD])
        expected = sorted(norms_B.argsort(descending=True)[:2].tolist())
        assert pairs_of(ask(engine)) == expected
        for pair in expected:
            p = 1 / (1 + torch.exp(torch.tensor(-MARGINS[pair], dtype=torch.float64)))
            matrix_DD = matrix_DD + p * (1 - p) * torch.outer(Z_BD[pair], Z_BD[pair])
    assert engine.labels == 6


def test_labels_do_not_change_what_is_asked() -> None:
    batch, extras = given()
    swapped = {name: values.reshape(8, 2, -1).flip(1).reshape(values.shape) for name, values in extras.items()}
    for by in ("uncertainty", "reward_diff", "margin", "closest", "distance", "random"):
        one, other = (
            AskEngine(AskAdvantage(by=by))(RewardOutput(torch.zeros(16)), batch, e) for e in (extras, swapped)
        )  # type: ignore[arg-type]
        assert pairs_of(one) == pairs_of(other), by


@pytest.mark.parametrize("by", ["uncertainty", "reward_diff", "random"])
def test_two_ranks_ask_what_one_asks(by: Any) -> None:
    alone = AskEngine(AskAdvantage(by=by))
    ranks = [AskEngine(AskAdvantage(by=by)) for _ in range(2)]
    halves = [slice(0, 4), slice(4, 8)]
    for step in (1, 2):
        expected, found = pairs_of(ask(alone, slice(None), step)), []
        for rank in range(2):
            other = halves[1 - rank]
            told = (torch.tensor(MARGINS, dtype=torch.float64)[other], Z_BD[other])
            found += [4 * rank + pair for pair in pairs_of(ask(ranks[rank], halves[rank], step, Rank(rank, told)))]
        assert found == expected
    for engine in ranks:
        torch.testing.assert_close(engine.state_dict()["inverse_DD"], alone.state_dict()["inverse_DD"])


def test_a_restored_engine_asks_as_the_one_that_went_on() -> None:
    first = AskEngine(AskAdvantage())
    ask(first)
    restored = AskEngine(AskAdvantage())
    restored.load_state_dict(first.state_dict())
    assert pairs_of(ask(restored, slice(None), 2)) == pairs_of(ask(first, slice(None), 2))
    assert restored.labels == first.labels == 4
    fresh = AskEngine(AskAdvantage())
    fresh.load_state_dict(AskEngine(AskAdvantage()).state_dict())
    assert pairs_of(ask(fresh)) == pairs_of(ask(AskEngine(AskAdvantage())))


def test_an_evaluation_measures_every_pair_and_teaches_nothing() -> None:
    engine = AskEngine(AskAdvantage())
    credit = ask(engine, slice(None), 0)
    assert credit.rows is None
    assert engine.labels == 0


def test_a_run_trains_on_the_pairs_that_it_asks_and_logs_how_many(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "good" * (1 + i % 3), "rejected": "bad"} for i in range(16)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = make_config(
        "active_reward",
        model="tiny:hidden=16,layers=1",
        data={"use": "json", "path": str(path)},
        batch_size=8,
        steps=2,
        output=str(tmp_path / "run"),
    )
    Run(config).train()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["ask/labels"] for step in logged] == [2.0, 4.0]
    assert all(step["ask/score"] > 0 for step in logged)


def test_options_outside_their_range_are_refused() -> None:
    for options in ({"share": 0.0}, {"share": 1.5}, {"damping": 0.0}):
        with pytest.raises(UsageError, match="must be in"):
            AskAdvantage(**options)
