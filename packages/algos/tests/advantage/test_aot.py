"""AOT against a sort of the whole batch, in one piece and over ranks; BCO's running mean."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch

from rlhf_algos.advantage.aot import AOTCredit
from rlhf_algos.advantage.bco import BCOCredit
from rlhf_algos.loss.aot import AOTLoss
from rlhf_algos.loss.bco_pair import BCOPairLoss
from rlhf_core.config.builder import make_config
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import Credit, RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.planner import make_plan


class OneOf(World):
    """A rank that knows what the others tell."""

    def __init__(self, rank: int, everyone: list[Any]) -> None:
        self.rank, self.size, self.everyone = rank, len(everyone), everyone

    def gather(self, thing: Any) -> list[Any]:
        return list(self.everyone.pop(0))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.everyone.pop(0)[1 - self.rank]


class Recorder(World):
    """A rank that remembers what it told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def gather(self, thing: Any) -> list[Any]:
        self.told.append(thing)
        return [thing]


def example(seed: int) -> tuple[torch.Tensor, Batch]:
    """Float64 log-probabilities that carry a gradient, and five pairs of ragged completions."""
    noise = torch.Generator().manual_seed(seed)
    batch = make_batch([5, 1, 3, 6, 2, 4, 1, 1, 7, 2], groups=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    logprobs_NT, ref_NT = (torch.randn(batch.mask_NT.shape, generator=noise).double() - 2 for _ in range(2))
    return logprobs_NT.requires_grad_(), batch.with_extras(ref_logprobs_NT=ref_NT)


def credited(advantage: Any, logprobs_NT: torch.Tensor, batch: Batch) -> Batch:
    extras = batch.extras | {"actor.logprobs_NT": logprobs_NT.detach()}
    credit: Credit = advantage(RewardOutput(torch.zeros(len(batch))), batch, extras)
    assert credit.returns_NT is not None
    return batch.with_extras(returns_NT=credit.returns_NT, advantages_NT=credit.advantages_NT)


def sorted_loss(logprobs_NT: torch.Tensor, batch: Batch, beta: float, s: float, paired: bool) -> torch.Tensor:
    """The mean over the sorted batch, with the gradient of torch's own sort."""
    pi, ref = ((x * batch.mask_NT).sum(1) for x in (logprobs_NT, batch["ref_logprobs_NT"]))
    above, below = (pi[0::2] - pi[1::2], ref[0::2] - ref[1::2]) if paired else ((pi - ref)[0::2], (pi - ref)[1::2])
    x = beta * (above.sort().values - below.sort().values)
    return -((1 - s) * torch.sigmoid(x).log() + s * torch.sigmoid(-x).log()).mean()


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("beta", "s"), [(0.1, 0.0), (0.6, 0.2)])
def test_value_and_gradient_are_those_of_the_sorted_batch_however_it_is_cut(
    beta: float, s: float, paired: bool
) -> None:
    for seed in range(3):
        logprobs_NT, batch = example(seed)
        expected = sorted_loss(logprobs_NT, batch, beta, s, paired)
        (wanted,) = torch.autograd.grad(expected, logprobs_NT)
        whole = credited(AOTCredit(paired), logprobs_NT, batch)
        loss = AOTLoss(beta=beta, label_smoothing=s, paired=paired)
        for cuts in ([[*range(10)]], [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]):  # micro-batches
            parts = [(cut, whole.rows(cut)) for cut in cuts]
            values = torch.cat(
                [loss({"logprobs_NT": logprobs_NT[cut, : part.mask_NT.shape[1]]}, part).values for cut, part in parts]
            )
            assert float(values.mean().detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
            (gradient,) = torch.autograd.grad(values.mean(), logprobs_NT)
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("paired", [True, False])
def test_partners_are_the_same_on_two_ranks(paired: bool) -> None:
    logprobs_NT, batch = example(0)
    alone = credited(AOTCredit(paired), logprobs_NT, batch)
    shares = [[*range(4)], [*range(4, 10)]]
    told = []
    for share in shares:
        rank = Recorder()
        credited(AOTCredit(paired), logprobs_NT[share], wide(batch, share, rank))
        told.append(rank.told)
    for number, share in enumerate(shares):
        mine = wide(batch, share, OneOf(number, [list(things) for things in zip(*told, strict=True)]))
        both = credited(AOTCredit(paired), logprobs_NT[share], mine)
        assert torch.equal(both["returns_NT"], alone["returns_NT"][share])


def test_bco_compares_with_the_running_mean_of_all_batches() -> None:
    """Two steps, the second by an engine that took the first one's state: z is the mean of both batches' means."""
    opened = BCOCredit().open(None)  # type: ignore[arg-type]
    means = []
    for seed in range(2):
        logprobs_NT, batch = example(seed)
        h = ((logprobs_NT - batch["ref_logprobs_NT"]) * batch.mask_NT).sum(1).tolist()
        means.append(sum(h) / len(h))
        after = BCOCredit().open(None)  # type: ignore[arg-type]
        after.load_state_dict(opened.state_dict())
        seen = credited(after, logprobs_NT, batch)
        z = sum(means) / len(means)
        log_sigmoid = lambda x: -log(1 + exp(-x))
        expected = [
            -log_sigmoid(0.4 * (w - z)) - log_sigmoid(-0.4 * (b - z)) for w, b in zip(h[0::2], h[1::2], strict=True)
        ]
        result = BCOPairLoss(beta=0.4)({"logprobs_NT": logprobs_NT}, seen)
        assert result.values.tolist() == pytest.approx(expected, rel=1e-6)
        chosen = result.metrics["chosen_reward"]
        assert float(chosen.total / chosen.count) == pytest.approx(sum(0.4 * (w - z) for w in h[0::2]) / 5, rel=1e-5)
        opened = after


def test_bco_counts_the_completions_of_all_ranks() -> None:
    logprobs_NT, batch = example(0)
    alone = credited(BCOCredit().open(None), logprobs_NT, batch)["returns_NT"][0, 0]  # type: ignore[arg-type]
    h_N = ((logprobs_NT.detach() - batch["ref_logprobs_NT"]) * batch.mask_NT).sum(1)
    other = torch.tensor([float(h_N[4:].sum()), 6.0], dtype=torch.float64)
    mine = wide(batch, [*range(4)], OneOf(0, [[None, other]]))
    assert credited(BCOCredit().open(None), logprobs_NT[:4], mine)["returns_NT"][0, 0] == pytest.approx(float(alone))  # type: ignore[arg-type]


def wide(batch: Batch, rows: list[int], world: World) -> Batch:
    """A rank's rows at the width of the whole batch."""
    part = replace(batch.rows(rows), world=world)
    return replace(
        part,
        mask_NT=batch.mask_NT[rows],
        extras={name: values[rows] for name, values in batch.extras.items()},
    )


@pytest.mark.parametrize(
    ("algorithm", "loss", "message"),
    [
        ("aot", "dpo", "the algorithm aot works only with the loss aot, not DPOLoss"),
        ("bco_pair", "aot", "the algorithm bco_pair works only with the loss bco_pair, not AOTLoss"),
        ("dpo", "aot", "AOTLoss needs returns_NT"),
    ],
)
def test_a_loss_without_its_credit_is_refused(algorithm: str, loss: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(make_config(algorithm, model="tiny", data={"use": "json", "path": "rows.jsonl"}, loss=loss))
