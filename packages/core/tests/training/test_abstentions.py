"""Completions from which the reward abstains leave their group, on one rank and on two; a step without any is skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from thread_ranks import together

from rlhf_core.cli import main
from rlhf_core.contract.batch import Batch, Rollouts
from rlhf_core.contract.distributed import World
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.providers import Advantage, Reward
from rlhf_core.contract.results import RewardOutput, ScoredRollouts
from rlhf_core.contract.selection import Filter
from rlhf_core.evaluator.heldout import Heldout
from rlhf_core.evaluator.pass_at_k import PassAtK
from rlhf_core.evaluator.win_rate import WinRate
from rlhf_core.loop import collect, credit, update
from rlhf_core.observer.files import sample_record, samples
from rlhf_core.testing import run_ranks, tiny_run
from rlhf_core.testing.tiny import tiny_rewards, tiny_rollouts
from rlhf_core.training.abstentions import Answers, answered_rows

MODEL = "tiny:hidden=16,layers=1"
HERE = Path(__file__).stem
NOBODY, FIRST, SOME, ALL = "nobody", "first", "some", "all"
RANKS = (54, 118, 130, 52, 87)
"""Prompts: those of rank 1 in step 1, of rank 0 in step 2, and one of rank 1 in step 3; the share says if it is so."""


@dataclass(frozen=True)
class Abstains(Reward):
    """Lengths, from which the reward abstains by the number of the prompt in the run."""

    who: str = NOBODY
    """nobody, the first of each group, whole groups of `prompts` (some), or all in the second step"""
    prompts: tuple[int, ...] = RANKS
    """numbers of the prompts of `some`"""
    beside: float = 0.0
    """what stands where it abstains, and must not matter"""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        uids_N = rollouts["uids_N"]
        first_N = torch.ones(len(rollouts), dtype=torch.bool)
        first_N[1:] = rollouts.group_N[1:] != rollouts.group_N[:-1]
        abstained_N = {
            NOBODY: torch.zeros_like(first_N),
            FIRST: first_N,
            SOME: torch.isin(uids_N, torch.tensor(self.prompts)),
            ALL: torch.full_like(first_N, rollouts.step.number == 2),
        }[self.who]
        rewards_N = torch.where(abstained_N, self.beside, rollouts.lengths_N + rollouts.tokens_NT[:, 0] % 7)
        return RewardOutput(rewards_N.float(), metrics={"first": first_N.float()}, abstained_N=abstained_N)


@dataclass(frozen=True)
class Raw(Advantage):
    """The reward, on every token: each row's credit is its own."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Batch, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(rollouts.mask_NT, rewards.rewards_N[:, None], 0.0)


def curve(output: Path) -> list[dict[str, Any]]:
    """The metrics of a run, a row a step."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_sample_without_a_reward_is_in_no_number_and_shown_as_null(tmp_path: Path) -> None:
    """Against the rewards that the others have, whatever stands in place of the missing one."""
    found = []
    for beside in (0.0, 1e6):
        run = tiny_run(tmp_path / str(beside), model=MODEL, steps=1, reward=Abstains(FIRST, beside=beside))
        metrics = run.train().metrics
        batch, left_out = run.samples["actor"], run.samples["actor/abstained"]
        assert (len(batch), len(left_out)) == (2, 2) and batch.group_N.tolist() == left_out.group_N.tolist()
        own_N = batch.lengths_N + batch.tokens_NT[:, 0] % 7
        assert batch["rewards_N"].tolist() == own_N.tolist()
        assert metrics["reward/mean"] == pytest.approx(float(own_N.double().mean()))
        assert metrics["reward/variance"] == pytest.approx(float(own_N.double().var(unbiased=False)))
        assert (metrics["reward/abstained"], metrics["reward/first"], metrics["samples"]) == (0.5, 0.0, 4)
        lines = [json.loads(line) for line in (run.output / "samples.jsonl").read_text().splitlines()]
        assert [(line["source"], line["reward"]) for line in lines] == [
            *(("actor", reward) for reward in own_N.tolist()),
            *[("actor/abstained", None)] * 2,
        ]
        found.append({name: value for name, value in metrics.items() if name.startswith(("loss", "grad", "reward"))})
    assert found[0] == found[1]


def test_a_part_of_a_sum_is_logged_over_the_samples_that_it_answered_for(tmp_path: Path) -> None:
    """The first part says 5 of one sample in two, the other 1 of each: means 5 and 1, and 3.5 for the sum."""

    def rare(completions: list[str]) -> list[float | None]:
        return [5.0 if number % 2 else None for number, _ in enumerate(completions)]

    def common(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    reward: Any = {"use": "sum", "parts": [rare, common]}
    metrics = tiny_run(tmp_path, model=MODEL, steps=1, reward=reward).train().metrics
    assert (metrics["reward/rare"], metrics["reward/common"], metrics["reward/mean"]) == (5.0, 1.0, 3.5)
    assert "reward/abstained" not in metrics


def test_a_reward_that_never_abstains_logs_and_changes_nothing(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model=MODEL, steps=1, reward=Abstains())
    assert "reward/abstained" not in run.train().metrics
    assert set(run.samples) == {"actor"} and "abstained_N" not in run.samples["actor"]
    scored = ScoredRollouts(tiny_rollouts(), tiny_rewards(tiny_rollouts()))
    assert answered_rows(scored, World(), [Answers.measure(scored)]) is scored


@pytest.mark.parametrize("dynamic", [False, True], ids=["plain", "dynamic"])
def test_a_step_without_any_reward_leaves_the_weights_as_they_are(tmp_path: Path, dynamic: bool) -> None:
    """Step 2 has none, with an optimizer whose momentum would move on."""
    options = {"filter": Kept()} if dynamic else {}
    run = tiny_run(tmp_path, model=MODEL, steps=3, reward=Abstains(ALL), **options)
    weights = []

    with run.open():
        for iteration in run.iterations(collect):
            credited = credit(run, iteration)
            update(run, iteration, credited)
            run.finish(iteration, credited)
            state: Any = run.roles["actor"].causal_lm.state_dict()  # type: ignore[attr-defined]
            weights.append(torch.cat([each.flatten() for each in state.values()]))
            if run.step == 2:
                assert all(row["reward"] is None for row in samples(run))
    steps = curve(tmp_path)
    assert [step.get("skipped/actor", 0) for step in steps] == [0, 1, 0]
    assert [step.get("reward/abstained") for step in steps] == [None, 1.0, None]
    assert "reward/mean" not in steps[1]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@dataclass(frozen=True)
class Kept(Filter):
    """All groups that the filter sees: those whose mean score is not below 0."""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> torch.Tensor:
        groups, index_N = torch.unique(rollouts.group_N, return_inverse=True)
        return torch.zeros(len(groups)).double().index_add(0, index_N, rewards.outcome_N) >= 0


def test_filters_see_no_abstention(tmp_path: Path) -> None:
    """Odd prompts have no reward: others are sampled in their place, and none of their rows is trained on."""
    run = tiny_run(tmp_path, model=MODEL, steps=1, reward=Abstains(SOME, tuple(range(1, 1000, 2)), 1e6), filter=Kept())
    metrics = run.train().metrics
    batch = run.samples["actor"]
    assert len(batch.group_N.unique()) >= 2 and set((batch["uids_N"] % 2).tolist()) == {0}
    assert metrics["reward/abstained"] == 1 - metrics["dynamic/kept"] > 0
    assert metrics["dynamic/reward"] < 15, "what stands in place of a reward is in no mean"


def test_two_ranks_with_other_numbers_of_abstentions_train_as_one(tmp_path: Path) -> None:
    """A rank without any reward gets a group of the other."""
    for ranks in (1, 2):
        words = [
            "rlhf_core.testing.tiny_algorithm:TinyAlgorithm",
            "--model",
            MODEL,
            "--batch-size",
            "4",
            "--steps",
            "3",
        ]
        words += ["--advantage", f"{HERE}:Raw", "--reward", f"{HERE}:Abstains", "--reward.who", SOME]
        words += ["--sampling.max-new-tokens", "6", "--actor.optim.lr", "1e-2", "--sampling.n", "2"]
        done = run_ranks(ranks, main, [*words, "--output", str(tmp_path / str(ranks))])
        assert not any(rank.code for rank in done), done[-1].stderr[-3000:]
    alone, together = (curve(tmp_path / str(ranks)) for ranks in (1, 2))
    for one, two, share in zip(alone, together, [0.5, 0.5, 0.25], strict=True):
        assert one["reward/abstained"] == two["reward/abstained"] == share
        for name in ("loss/actor", "reward/mean", "reward/first"):  # float32 summed in another order
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("abstained", "left"),
    [([True] * 4, [None, None]), ([True, True, False, True], [1, 0]), ([True, False, False, True], [1, 1])],
)
def test_groups_that_are_left_are_dealt_and_a_step_without_any_is_skipped_by_all(
    abstained: list[bool], left: list[int | None]
) -> None:
    """One group for two ranks is the first rank's; with two groups each gets one."""
    scored = ScoredRollouts(tiny_rollouts(2, 2), RewardOutput(torch.zeros(4), abstained_N=torch.tensor(abstained)))

    def rank(world: World) -> int | None:
        mine = scored if world.rank == 0 else scored.rows([])
        found = answered_rows(mine, world, [Answers.measure(scored), Answers(0, [], [])])
        return None if found is None else len(found)

    assert together(rank, 2) == left


# ----------------------------------------------------------------------------------------------------------------------
# evaluators
# ----------------------------------------------------------------------------------------------------------------------


def viewed(output: Path, abstained: list[bool], rewards: list[float], other: list[float] | None = None) -> Any:
    """A run whose two prompts have four completions each; `other` are the rewards of the opponent's."""
    rollouts = tiny_rollouts(2, 4)
    rollouts.meta = [{"datasource": "a"}] * 4 + [{"datasource": "b"}] * 4
    rollouts.extras["uids_N"] = torch.arange(2).repeat_interleave(4)
    answers = [RewardOutput(torch.tensor(rewards), abstained_N=torch.tensor(abstained))]
    answers += [RewardOutput(torch.tensor(other))] if other else []
    return SimpleNamespace(
        world=World(),
        leader=True,
        step=0,
        output=output,
        plan=SimpleNamespace(sources=("actor",), roles={"actor": None}, online=True),
        config=SimpleNamespace(sampling=Sampling(), seed=0),
        heldout=lambda most: [SimpleNamespace()] * 2,
        encoder=SimpleNamespace(prompts=lambda rows, uids: None),
        rollouts=lambda *_: rollouts,
        reward_of=lambda _: answers.pop(0),
    )


THREE = [True, False, False, False, True, True, True, False]
NONE = [False] * 4 + [True] * 4


def test_heldout_is_the_mean_over_those_that_answered(tmp_path: Path) -> None:
    """Prompt a: (2 + 3 + 4) / 3; prompt b: 8."""
    metrics = Heldout(n=4)(viewed(tmp_path, THREE, [9.0, 2, 3, 4, 9, 9, 9, 8]))
    assert metrics["heldout/reward"] == pytest.approx(5.5) and metrics["heldout/abstained"] == 0.5
    assert metrics["heldout/reward_se"] == pytest.approx(2.5)
    assert (metrics["heldout/reward/a"], metrics["heldout/reward/b"]) == pytest.approx((3, 8))
    shown = [json.loads(line)["reward"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert shown == [None, None]
    whole = Heldout(n=4)(viewed(tmp_path, NONE, [1.0] * 8))
    assert whole["heldout/reward"] == 1 and "heldout/reward/b" not in whole
    nothing = Heldout(n=4)(viewed(tmp_path, [True] * 8, [1.0] * 8))
    assert "heldout/reward" not in nothing and nothing["heldout/abstained"] == 1


def test_heldout_averages_what_the_reward_measures_beside_the_score(tmp_path: Path) -> None:
    """Prompt a: (1 + 0 + 1) / 3 of the three that answered; prompt b: the one that answered has no value."""
    view = viewed(tmp_path, THREE, [0.0] * 8)
    known_N = torch.tensor([True] * 7 + [False])
    metrics = {"whole": torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1])}
    view.reward_of = lambda _: RewardOutput(
        torch.zeros(8), metrics=metrics, known={"whole": known_N}, abstained_N=torch.tensor(THREE)
    )
    measured = Heldout(n=4)(view)
    assert measured["heldout/whole"] == pytest.approx(2 / 3) and measured["heldout/whole_se"] == 0
    view.reward_of = lambda _: RewardOutput(torch.zeros(8), metrics=metrics)
    measured = Heldout(n=4)(view)
    assert measured["heldout/whole"] == pytest.approx(7 / 8)
    assert measured["heldout/whole_se"] == pytest.approx(1 / 8)  # of the means 3/4 and 1: sd 0.177, over the root of 2


def test_heldout_shows_the_question_of_a_chat(tmp_path: Path) -> None:
    view = viewed(tmp_path, [False] * 8, [0.0] * 8)
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"})
    view.rollouts().meta = [{"prompt": chat}] * 4 + [{"prompt": "plain"}] * 4
    Heldout(n=4, shown=2)(view)
    shown = [json.loads(line)["question"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert shown == ["How are you?", "plain"]


def test_pass_at_k_draws_from_those_that_answered(tmp_path: Path) -> None:
    """Prompt a has 1 right of 3; prompt b 1 of 1, too few for pass@2: 1 - C(2, 2) / C(3, 2) = 2/3."""
    metrics = PassAtK(k=2, n=4)(viewed(tmp_path, THREE, [1.0, 1, 0, 0, 1, 1, 1, 1]))
    assert metrics["pass@1"] == pytest.approx((1 / 3 + 1) / 2) and metrics["pass@2"] == pytest.approx(2 / 3)
    assert PassAtK(k=2, n=4)(viewed(tmp_path, [True] * 8, [1.0] * 8)) == {}


def test_win_rate_counts_pairs_that_both_have_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt a: one win, one tie, one loss of three: 1/2. Prompt b: its one pair is won."""
    other = [0.0, 1, 3, 5, 0, 0, 0, 7]
    run = viewed(tmp_path, THREE, [9.0, 2, 3, 4, 9, 9, 9, 8], other)
    monkeypatch.setattr(WinRate, "_sample", lambda *_: run.rollouts())
    metrics = WinRate(n=4)(run)
    assert metrics["win_rate"] == pytest.approx(0.75)
    assert metrics["win_rate/reward"] == pytest.approx((3 + 8) / 2)
    assert metrics["win_rate/reward_reference"] == pytest.approx((3 + 7) / 2)


def test_a_record_of_a_sample_without_a_reward_says_null() -> None:
    batch = tiny_rollouts().with_extras(rewards_N=torch.ones(8), abstained_N=torch.tensor(THREE))
    assert [sample_record(batch, i)["reward"] for i in range(3)] == [None, 1.0, 1.0]
