"""Dynamic sampling and running normalization: which prompts are kept, what ranks and resuming change (nothing)."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core import Registry, Run, hookimpl
from rlhf_core.config.builder import make_config
from rlhf_core.contract.batch import Example, Rollouts
from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import RewardOutput, ScoredRollouts
from rlhf_core.contract.selection import Filter
from rlhf_core.data.stream import DrawnRows
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.testing.batches import make_batch
from rlhf_core.testing.tiny_algorithm import TinyAlgorithm
from rlhf_core.training.dynamic_sampling import DynamicSampling, choose_filter, keep_sampling
from rlhf_core.training.filters import InsideFilter, VariedFilter, accepted_groups
from rlhf_core.training.reward_shaping import RewardShaping
from rlhf_core.training.running_moments import Moments
from rlhf_core.training.step_metrics import Meter

GROUPS = torch.tensor([3, 3, 1, 1, 7, 7])


@pytest.mark.parametrize(
    ("group_filter", "accepted"),
    [
        (VariedFilter(), [False, True, False]),
        (InsideFilter(), [False, True, False]),
        (InsideFilter(low=-1.0, high=0.5), [False, False, True]),  # 0.5 itself is outside
        (InsideFilter(low=-1.0, high=2.0), [True] * 3),
    ],
    ids=str,
)
def test_prompts_are_accepted_by_their_completions_scores(group_filter: Filter, accepted: list[bool]) -> None:
    """Group 3 is half right, group 1 all right, group 7 all wrong; the answer is in the order 1, 3, 7."""
    rollouts = replace(make_batch([1] * 6), group_N=GROUPS)
    scores_N = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert accepted_groups(group_filter, rollouts, RewardOutput(scores_N)).tolist() == accepted
    misleading_N = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert accepted_groups(group_filter, rollouts, RewardOutput(misleading_N, scores_N=scores_N)).tolist() == accepted


@dataclass(frozen=True)
class Answers(Filter):
    """Returns what it is given."""

    kind: str = "list"
    """the wrong answer"""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> torch.Tensor:
        answers: dict[str, Any] = {"list": [True] * 3, "float": torch.ones(3), "N": torch.ones(6, dtype=torch.bool)}
        return answers[self.kind]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("list", "filter Answers of .*test_dynamic_sampling must return a tensor, not list"),
        ("float", r"filter Answers .* returned torch.float32 of shape \(3,\); return torch.bool of shape \(3,\)"),
        ("N", r"filter Answers .* returned torch.bool of shape \(6,\); return torch.bool of shape \(3,\)"),
    ],
)
def test_a_filter_that_returns_something_else_is_named(kind: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        accepted_groups(Answers(kind), replace(make_batch([1] * 6), group_N=GROUPS), RewardOutput(torch.zeros(6)))


def test_options_without_sense_are_refused() -> None:
    for wrong in ({"rounds": 0}, {"oversample": 0}, {"low": 1.0}):
        with pytest.raises(UsageError, match="must be"):
            DynamicSampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="low must be below high, not 1.0 and 1.0"):
        InsideFilter(low=1.0)


def test_a_filter_by_name_takes_the_place_of_the_usual_one_and_not_of_one_that_was_set() -> None:
    def chosen(algorithm: object, **options: Any) -> Filter | None:
        return choose_filter(make_config(algorithm, model="tiny", **options))

    assert chosen(Controlled()) == VariedFilter()
    assert chosen(Controlled(), filter="none") == VariedFilter(), "`keep` is left"
    assert chosen(Controlled(), filter={"use": "inside", "low": 0.25}) == InsideFilter(low=0.25)
    assert chosen(Controlled(dynamic=DynamicSampling("inside", high=0.75))) == InsideFilter(high=0.75)
    assert chosen(Controlled(dynamic=DynamicSampling()), filter="inside") == InsideFilter()
    assert chosen(Controlled(dynamic=DynamicSampling())) is None
    assert chosen(TinyAlgorithm()) is None
    assert chosen(TinyAlgorithm(), filter="varied") == VariedFilter()
    with pytest.raises(UsageError, match=r"keep.* inside and .*filter.* both select prompts; leave out one of them"):
        chosen(Controlled(dynamic=DynamicSampling("inside")), filter="varied")


# ----------------------------------------------------------------------------------------------------------------------
# rounds, on a run that is only what is asked of it
# ----------------------------------------------------------------------------------------------------------------------


class Ranks(World):
    """Threads that tell each other everything."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.meeting = rank, len(board), board, barrier

    def gather(self, thing: Any) -> list[Any]:
        self.board[self.rank] = thing
        self.meeting.wait(120)
        everything = list(self.board)
        self.meeting.wait(120)
        return everything

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(tensor)).sum(0)


class Few:
    """Iteration for `keep_sampling`: 4 prompts per batch; number k is worth keeping if k is in `good`."""

    def __init__(self, good: set[int], world: World, step: int = 1) -> None:
        self.good, self.world, self.step, self.drawn = good, world, step, 0
        self.config = type("Config", (), {"batch_size": 4})
        self.meter = Meter(world)

    def draw(self) -> DrawnRows:
        share = 4 // self.world.size
        first = self.drawn + self.world.rank * share
        self.drawn += 4
        return DrawnRows([Example(str(k)) for k in range(first, first + share)], list(range(first, first + share)))

    def sample_once(self, source: str, drawn: DrawnRows) -> Rollouts:
        uids = [uid for uid in drawn.uids for _ in range(2)]
        batch = make_batch([1 + uid % 3 for uid in uids], groups=[i // 2 for i in range(len(uids))])
        return replace(batch, world=self.world).with_extras(uids_N=torch.tensor(uids))

    def judge(self, source: str, rollouts: Rollouts) -> ScoredRollouts:
        rewards_N = torch.tensor(
            [float(uid in self.good and k % 2) for k, uid in enumerate(rollouts["uids_N"].tolist())]
        )
        rewards_NT = rewards_N[:, None] * rollouts.mask_NT
        return ScoredRollouts(rollouts, RewardOutput(rewards_N, rewards_NT, metrics={"twice": 2 * rewards_N}))


def kept(good: set[int], dynamic: DynamicSampling, size: int = 1, step: int = 1) -> tuple[list[list[int]], Few]:
    """The prompts that each rank keeps, and the first rank's run."""
    barrier, board = threading.Barrier(size), [None] * size
    runs = [Few(good, Ranks(rank, board, barrier) if size > 1 else World(), step) for rank in range(size)]
    found: dict[int, list[int]] = {}

    def one(rank: int) -> None:
        run: Any = runs[rank]
        scored = keep_sampling(run, "actor", run.draw(), VariedFilter(), dynamic)
        rollouts, rewards = scored.rollouts, scored.rewards
        assert rewards.rewards_N.tolist() == [0.0, 1.0] * (len(rollouts) // 2) or not good
        assert rewards.metrics["twice"].tolist() == (2 * rewards.rewards_N).tolist()
        assert rewards.rewards_NT is not None
        assert rewards.rewards_NT.shape == rollouts.mask_NT.shape
        assert sorted(rollouts.extras) == ["uids_N"]
        found[rank] = rollouts["uids_N"][::2].tolist()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found.get(rank, []) for rank in range(size)], runs[0]


def test_rounds_go_on_until_enough_is_kept_and_nothing_kept_is_lost() -> None:
    (uids,), run = kept({1, 2, 6, 9, 10, 11, 12}, DynamicSampling())
    assert uids == [1, 2, 6, 9, 10, 11], "three rounds: 2, then 1, then 3, and all six are trained on"
    logged = run.meter.take()
    assert logged["dynamic/rounds"] == 3 and logged["dynamic/prompts"] == 12
    assert logged["dynamic/kept"] == 0.5
    assert run.drawn == 12, "the data stands where the next step begins"


def test_over_sampling_needs_fewer_rounds() -> None:
    (uids,), run = kept({1, 2, 6, 9, 10, 11, 12}, DynamicSampling(oversample=3))
    assert uids == [1, 2, 6, 9, 10, 11] and run.meter.take()["dynamic/rounds"] == 1


def test_when_rounds_run_out_what_was_kept_is_trained_on() -> None:
    (uids,), run = kept({0, 5}, DynamicSampling(rounds=3))
    assert uids == [0, 5] and run.drawn == 12


def test_finding_nothing_is_a_mistake_at_first_and_survived_later() -> None:
    run: Any = Few(set(), World())
    with pytest.raises(UsageError, match=r"the filter VariedFilter\(\) accepts the completions of none of 8 prompts"):
        keep_sampling(run, "actor", run.draw(), VariedFilter(), DynamicSampling(rounds=2))
    (uids,), _ = kept(set(), DynamicSampling(rounds=2), step=6)
    assert uids == [4, 5, 6, 7], "the last round as it is: equal scores, so no credit"


@settings(max_examples=15, deadline=None)
@given(good=st.sets(st.integers(0, 40), min_size=9), oversample=st.integers(1, 2))
def test_the_number_of_ranks_changes_who_trains_on_a_prompt_and_never_which(good: set[int], oversample: int) -> None:
    dynamic = DynamicSampling(oversample=oversample, rounds=12)
    (alone,), _ = kept(good, dynamic)
    shares, _ = kept(good, dynamic, size=2)
    assert sorted(uid for share in shares for uid in share) == sorted(alone)
    assert abs(len(shares[0]) - len(shares[1])) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# whole runs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Controlled(TinyAlgorithm):
    """The tiny algorithm with both."""

    shaping: RewardShaping = RewardShaping(normalize="running")
    dynamic: DynamicSampling = DynamicSampling("varied", rounds=20)


class Stop:
    """Ends a run early."""

    @hookimpl
    def rlhf_step_end(self, step: int) -> bool:
        return step == 2


def lines(folder: Path) -> Iterator[dict[str, float]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        yield {
            name: value
            for name, value in json.loads(line).items()
            if not name.startswith(("time/", "speed/", "memory/"))
        }


def test_a_resumed_run_goes_on_with_the_prompts_and_the_scale_it_had(tmp_path: Path) -> None:
    def run(output: Path, registry: Registry | None = None, **options: Any) -> None:
        small = {"model": "tiny", "steps": 4, "batch_size": 2, "sampling": {"n": 2, "max_new_tokens": 3}}
        # the length of what is said decides, and is often the same twice: some rounds keep nothing
        config = make_config(
            Controlled(), reward={"use": "length", "target": 3}, output=str(output), **small, **options
        )
        Run(config, registry).train()

    run(tmp_path / "straight")
    registry = Registry()
    registry.register(Stop(), name="stop")
    run(tmp_path / "run", registry)
    run(tmp_path / "run", resume=True)
    straight = list(lines(tmp_path / "straight"))
    assert list(lines(tmp_path / "run")) == straight
    assert max(line["dynamic/rounds"] for line in straight) > 1
    assert any(abs(line["reward/mean"] - line["reward/unshaped"]) > 0.01 for line in straight)


# ----------------------------------------------------------------------------------------------------------------------
# running moments
# ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    batches=st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=6), offset=st.floats(-1e6, 1e6)
)
def test_running_moments_are_those_of_everything_seen(batches: list[list[float]], offset: float) -> None:
    moments = Moments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64) + offset)
        moments = Moments(*json.loads(json.dumps(moments.state())))  # as a checkpoint keeps it
    every = [value + offset for batch in batches for value in batch]
    if every:
        assert moments.mean == pytest.approx(statistics.fmean(every), abs=1e-6)
        assert moments.std == pytest.approx(statistics.pstdev(every), abs=1e-6)


def test_running_and_fixed_normalization_give_these_numbers() -> None:
    """1 and 3 have mean 2 and deviation 1; with 5 and 7 these are 4 and sqrt 5."""
    seen, running, rollouts = Moments(), RewardShaping(normalize="running"), make_batch([1, 1])
    shaped = [
        running(RewardOutput(torch.tensor(pair)), rollouts, 5, seen).rewards_N.tolist()
        for pair in ([1.0, 3.0], [5.0, 7.0])
    ]
    assert shaped == [[-1.0, 1.0], pytest.approx([1 / 5**0.5, 3 / 5**0.5])]
    fixed = RewardShaping(normalize="fixed", mean=1.0, std=4.0, clip=1.2)
    assert fixed(RewardOutput(torch.tensor([3.0, 7.0])), rollouts, 5).rewards_N.tolist() == pytest.approx([0.5, 1.2])
    assert running(RewardOutput(torch.tensor([2.0, 2.0])), rollouts, 5, Moments()).rewards_N.tolist() == [0.0, 0.0]
    with pytest.raises(UsageError, match="std must be above 0"):
        RewardShaping(std=0.0)
