"""Reductions: the mean over the whole optimizer step, however it is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import ThreadWorld, together

from rlhf_core.contract.batch import StepInfo
from rlhf_core.contract.distributed import World
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.results import Metric, Reduction, RewardOutput
from rlhf_core.run.rollout_metrics import log_completions, log_rewards
from rlhf_core.testing.batches import make_batch, values_like
from rlhf_core.training.microbatch import Minibatches, bearable_padding, micro_rows, padding_share
from rlhf_core.training.reduction import Counts, Means, SharedNames, count, weighted_sum
from rlhf_core.training.step_metrics import Meter

LENGTHS = [3, 1, 4, 0, 2, 1]  # one of them empty


def by_hand(per: str, values: list[list[float]]) -> float:
    """Each reduction in plain Python, from its definition."""
    rows = [row[:n] for row, n in zip(values, LENGTHS, strict=True)]
    flat = [x for row in rows for x in row]
    return {
        "token": sum(flat) / len(flat),
        "sequence": sum(sum(row) / len(row) for row in rows if row) / sum(map(bool, rows)),
        "prompt": sum(flat) / 2,  # the first two rows and the others share a prompt
        "constant": sum(flat) / (len(rows) * 7),
        "sum": sum(flat),
    }[per]


@pytest.mark.parametrize("per", ["token", "sequence", "prompt", "constant", "sum"])
def test_a_reduction_is_its_definition_and_padding_cannot_leak_in(per: str) -> None:
    batch = make_batch(LENGTHS, groups=[0, 0, 1, 1, 1, 1])
    values_NT = values_like(batch).masked_fill(~batch.mask_NT, float("nan"))
    reduction = Reduction(per, length=7)  # type: ignore[arg-type]
    result = weighted_sum(values_NT, reduction, batch) / count(reduction, batch)
    assert float(result) == pytest.approx(by_hand(per, values_NT.tolist()), rel=1e-6)


def test_pairs_are_averaged_over_pairs() -> None:
    batch = make_batch(LENGTHS)
    reduction = Reduction("sample")
    values = torch.tensor([2.0, 4.0, 6.0])
    assert float(weighted_sum(values, reduction, batch)) / count(reduction, batch, rows_per_unit=2) == 4.0


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    budget=st.integers(1, 60),
    per=st.sampled_from(["token", "sequence", "constant", "sum"]),
)
def test_cutting_into_micro_batches_changes_no_reduction(lengths: list[int], budget: int, per: str) -> None:
    batch = make_batch(lengths)
    batch.extras["values_NT"] = values_like(batch)
    reduction = Reduction(per, length=5)  # type: ignore[arg-type]
    whole = weighted_sum(batch["values_NT"], reduction, batch)
    cuts = micro_rows(batch, budget)
    parts = sum(weighted_sum(micro["values_NT"], reduction, micro) for micro in map(batch.rows, cuts))
    assert sorted(torch.cat(cuts).tolist()) == list(range(len(lengths)))
    assert float(parts) == pytest.approx(float(whole), rel=1e-5, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=12).filter(lambda x: len(x) % 2 == 0),
    budget=st.integers(1, 80),
)
def test_micro_batches_keep_pairs_together_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    batch = make_batch(lengths)
    for rows in micro_rows(batch, budget, rows_per_unit=2):
        pairs = rows.view(-1, 2)
        assert torch.equal(pairs[:, 1], pairs[:, 0] + 1)
        assert len(pairs) == 1 or len(rows) * (2 + max(lengths[i] for i in rows.tolist())) <= budget


def test_rows_of_like_length_share_a_micro_batch() -> None:
    """Sorted by length: eight rows of 1 and eight of 99 in budgets of 816 tokens hold no padding at all."""
    batch = make_batch([1, 99] * 8)
    cuts = micro_rows(batch, 816)
    assert padding_share(batch, cuts) == 0
    assert padding_share(batch, [torch.arange(16)]) == pytest.approx(1 - (8 * 3 + 8 * 101) / (16 * 101))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=64), budget=st.integers(1, 4096))
def test_where_padding_costs_time_a_twentieth_of_each_micro_batch_is_the_most(lengths: list[int], budget: int) -> None:
    """Or less than one row of the usual length: a few cells are cheaper than another micro-batch."""
    batch = make_batch(lengths)
    cuts = micro_rows(batch, budget, padding=0.05)
    assert sorted(torch.cat(cuts).tolist()) == list(range(len(lengths)))
    for rows in cuts:
        totals = [2 + lengths[i] for i in rows.tolist()]
        cells = len(rows) * max(totals)
        assert cells - sum(totals) <= max(0.05 * cells, 32)
        assert len(rows) == 1 or cells <= budget


def test_padding_is_borne_where_it_costs_nothing_or_where_launches_cost_more() -> None:
    layer = torch.nn.Linear(1, 1)
    layer.packs = False  # type: ignore[assignment]  # as a strategy's module declares
    assert bearable_padding(layer) == 0.05
    assert bearable_padding(layer.to("meta")) == 1.0
    layer = torch.nn.Linear(1, 1)
    layer.packs = True  # type: ignore[assignment]
    assert bearable_padding(layer) == 1.0


def test_minibatches_hold_whole_groups_and_every_row_once() -> None:
    batch = make_batch([1, 2, 3, 4, 5, 6], groups=[0, 0, 1, 1, 2, 2])
    parts = [part["data"] for part in Minibatches({"data": batch}, 3, [5, 6], World())]
    for epoch in (parts[:3], parts[3:]):
        assert sorted(text for part in epoch for text in part.texts) == batch.texts
        assert all(len(part.group_N.unique()) == 1 and len(part) == 2 for part in epoch)
    again = [part["data"].texts for part in Minibatches({"data": batch}, 3, [5], World())]
    assert again == [part.texts for part in parts[:3]] != [part.texts for part in parts[3:]]
    assert all(part["data"] is batch for part in Minibatches({"data": batch}, 1, [5, 6], World()))


def test_metrics_are_means_with_their_own_denominators() -> None:
    means = Means()
    means.add_metric("clip", Metric.over(torch.tensor([1.0, 0.0]), torch.tensor([True, True])))
    means.add_metric("clip", Metric.over(torch.tensor([1.0, 5.0]), torch.tensor([True, False])))
    means.add_metric("never", Metric.over(torch.tensor([1.0]), torch.tensor([False])))
    means.add_sum("time/train", 1.5)
    means.add_sum("time/train", 0.5)
    assert means.reduce() == {"clip": pytest.approx(2 / 3), "time/train": 2.0}


class OneOfTwo(World):
    """A rank that knows what both hold."""

    size = 2

    def __init__(self, held: list[list[int]]) -> None:
        self.held = held

    def gather(self, thing: object) -> list[object]:
        assert thing in [{"data": each} for each in self.held]
        return [{"data": each} for each in self.held]


def test_minibatches_are_cut_from_all_ranks_together_so_their_number_changes_no_part() -> None:
    whole = make_batch([1, 2, 3, 4, 5, 6], groups=[0, 0, 1, 1, 2, 2]).with_extras(
        uids_N=torch.tensor([7, 7, 8, 8, 9, 9])
    )
    alone = [set(part["data"].texts) for part in Minibatches({"data": whole}, 2, [5], World())]
    ranks = [whole.rows([0, 1, 4, 5]), whole.rows([2, 3])]
    world = OneOfTwo([[7, 9], [8]])
    split = [[set(part["data"].texts) for part in Minibatches({"data": rank}, 2, [5], world)] for rank in ranks]
    assert [a | b for a, b in zip(*split, strict=True)] == alone
    told = [replace(rank, step=StepInfo(uids=(7, 8, 9))) for rank in ranks]  # then they need not ask
    silent = [[set(part["data"].texts) for part in Minibatches({"data": each}, 2, [5], World())] for each in told]
    assert silent == split


def test_the_entropy_is_the_mean_over_sampled_tokens_alone() -> None:
    """-log p of 0.1, 0.2 and 0.6 at three sampled tokens; padding and an environment's token say something else."""
    meter = Meter()
    batch = make_batch([3, 1])
    batch.mask_NT[0, 2] = False  # an environment's
    rollouts = batch.with_extras(sampler_logprobs_NT=torch.tensor([[-0.1, -0.2, -5.0], [-0.6, -7.0, -9.0]]))
    log_completions(meter, "completion", rollouts, Sampling())
    assert meter.take()["completion/entropy"] == pytest.approx(0.3)


def test_the_kept_mass_is_that_of_all_ranks_tokens() -> None:
    """Half of the probability of 3 tokens here, and all of that of 1 token there: 2.5 of 4."""

    def rank(world: World) -> float:
        meter = Meter(world)
        rollouts: Any = replace(
            make_batch([1] if world.rank else [2, 1]), scalars={"kept_mass": 0.5 + 0.5 * world.rank}
        )
        rollouts.finish = ["stop"] * len(rollouts)
        log_completions(meter, "completion", rollouts, Sampling(temperature=0.0))
        return meter.take()["rollout/kept_mass"]

    assert together(rank, 2) == [0.625, 0.625]


def test_the_mean_reward_counts_what_tokens_earned() -> None:
    """1 + (2 + 3) and 4: mean 5, variance 1."""
    meter = Meter()
    rewards = RewardOutput(torch.tensor([1.0, 4.0]), torch.tensor([[2.0, 3.0], [0.0, 0.0]]))
    log_rewards(meter, "reward", rewards, make_batch([2, 1]))
    assert meter.take() == {"reward/mean": 5.0, "reward/variance": 1.0}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_numbers_of_a_step_are_those_of_all_rows_in_one_reduction(size: int) -> None:
    """Ranks with unlike numbers of rows, one of them without any; a second round has a mean of its own."""
    rewards_N = torch.tensor([1.0, 4.0, -2.0, 0.5, 7.0, 3.0, 3.0], dtype=torch.float64)
    sources = ["a", "b", "b", "a", "c", "a", "b"]

    def rank(world: ThreadWorld) -> tuple[list[dict[str, float]], int]:
        meter, found = Meter(world), []
        share = [i for i in range(7) if min(i // 3, size - 1) == world.rank]
        for _ in range(3):
            for rows_N in (rewards_N[share], rewards_N[share] * 2):
                meter.log_batch("mean", rows_N)
            meter.log_variance("variance", rewards_N[share] + 1000)
            meter.log_sources("mean", rewards_N[share], [{"datasource": sources[i]} for i in share])
            meter.log_total("rows", len(share))
            before = world.calls
            found.append(meter.take())
        return found, world.calls - before

    for found, calls in together(rank, size):
        assert calls == (size > 1), "names are agreed on once"
        for metrics in found:
            assert metrics.pop("rows") == 7
            assert metrics == pytest.approx(
                {
                    "mean": float(rewards_N.mean() * 1.5),
                    "variance": float(rewards_N.var(correction=0)),
                    "mean/a": 4.5 / 3,
                    "mean/b": 5 / 3,
                    "mean/c": 7.0,
                },
                rel=1e-9,
            )


def test_counts_are_those_of_the_rows_of_all_ranks() -> None:
    whole = make_batch([1, 2, 3, 4], groups=[0, 0, 1, 1])
    ranks = [Counts.measure(whole.rows(rows), rounds) for rounds, rows in ((2, [0, 1]), (1, [2, 3]))]
    both = Counts.add_up(ranks)
    assert (both.rounds, both.tokens) == (2, float((whole.prompt_lengths_N + whole.lengths_N).sum()))
    for per in ("token", "sequence", "sample", "prompt", "constant"):
        reduction = Reduction(per, length=8)
        assert both.denominator(reduction, 2) == count(reduction, whole, 2) > 0


def test_the_largest_value_of_a_name_is_that_of_any_rank_and_nan_is_larger_than_all() -> None:
    names = [SharedNames() for _ in range(3)]

    def rank(world: ThreadWorld) -> list[dict[str, float]]:
        found = []
        for values in ([1.5, 4.0, 2.5], [2.0, 1.0, float("nan")]):
            means = Means()
            means.add("mean", values[world.rank], float(world.rank != 2))
            if world.rank:  # one rank has none
                means.add_largest("most", values[world.rank])
                means.add_largest("most", 0.5)
            found.append(means.reduce(world, names[world.rank]))
        return found

    for first, second in together(rank, 3):
        assert first == {"mean": 4.0, "most": 4.0}
        assert second == pytest.approx({"mean": float("nan"), "most": float("nan")}, nan_ok=True)
