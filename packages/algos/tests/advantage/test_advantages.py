"""Every advantage estimator against a plain loop in float64, published numbers, and invariances."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from advantage_table import TABLE, Given, gae, given_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_algos.advantage.batch_mean import BatchMeanAdvantage
from rlhf_algos.advantage.best_of_n import BestOfNAdvantage
from rlhf_algos.advantage.dr_grpo import DrGRPOAdvantage
from rlhf_algos.advantage.gae import GAEAdvantage
from rlhf_algos.advantage.grpo import GRPOAdvantage
from rlhf_algos.advantage.kto import KTOAdvantage
from rlhf_algos.advantage.maxrl import MaxRLAdvantage
from rlhf_algos.advantage.pairs import PairsAdvantage
from rlhf_algos.advantage.reinforce_pp import ReinforcePPAdvantage
from rlhf_algos.advantage.reinforce_pp_baseline import ReinforcePPBaselineAdvantage
from rlhf_algos.advantage.rloo import RLOOAdvantage
from rlhf_algos.advantage.teacher import TeacherAdvantage
from rlhf_algos.returns import discounted_returns, scan
from rlhf_core.contract.batch import StepInfo
from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import Credit, Metric, RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch

each_estimator = pytest.mark.parametrize(
    ("advantage", "reference"), TABLE, ids=lambda x: repr(x) if hasattr(x, "needs") else ""
)


@each_estimator
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_estimator_agrees_with_a_loop_over_its_definition(advantage, reference, seed):
    batch = given_batch(seed)
    credit = batch.credit(advantage)
    expected = [x for row in reference(batch.rows()) for x in row]
    assert credit.advantages_NT[batch.rollouts.mask_NT].tolist() == pytest.approx(expected, abs=2e-6)
    assert credit.advantages_NT.dtype == torch.float32
    assert not credit.advantages_NT[~batch.rollouts.mask_NT].any(), "credit is zero outside the mask"


def test_the_returns_that_a_critic_learns_are_not_whitened():
    batch = given_batch()
    expected = [x for row in gae(batch.rows(), 1.0, 0.95)[1] for x in row]
    returns_NT = batch.credit(GAEAdvantage()).returns_NT
    assert returns_NT is not None
    assert returns_NT[batch.rollouts.mask_NT].tolist() == pytest.approx(expected, abs=2e-6)
    assert not returns_NT[~batch.rollouts.mask_NT].any()


@each_estimator
def test_equal_rewards_teach_nothing_and_are_not_nan(advantage, reference):
    batch = given_batch()
    batch.rollouts.mask_NT = torch.ones_like(batch.rollouts.mask_NT)
    batch.rewards = RewardOutput(torch.full((6,), 0.1), None)
    batch.values_NT = torch.full_like(batch.values_NT, 0.1)
    advantages_NT = batch.credit(advantage).advantages_NT
    assert torch.isfinite(advantages_NT).all()
    discounted = getattr(advantage, "gamma", 1.0) < 1  # tells early tokens from late ones
    without_baseline = isinstance(advantage, ReinforcePPAdvantage) and advantage.whiten == "none"
    if not discounted and not without_baseline:
        assert advantages_NT.abs().max() < 1e-6


@each_estimator
def test_a_completion_without_sampled_tokens_changes_nobody_elses_sign(advantage, reference):
    batch = given_batch()
    batch.rollouts.mask_NT[1] = False
    batch.rewards = replace(batch.rewards, rewards_NT=batch.rewards.rewards_NT * batch.rollouts.mask_NT)
    advantages_NT = batch.credit(advantage).advantages_NT
    assert torch.isfinite(advantages_NT).all()
    assert not advantages_NT[1].any()


@each_estimator
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), padding=st.integers(0, 5), shift=st.integers(-3, 9))
def test_order_padding_and_group_numbers_do_not_matter(advantage, reference, seed, padding, shift):
    batch = given_batch(seed)
    expected_NT = batch.credit(advantage).advantages_NT
    order_N = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = batch.rollouts.rows(order_N)
    pad = lambda x_NT: torch.nn.functional.pad(x_NT[order_N], (0, padding))
    moved.mask_NT, moved.group_N = pad(batch.rollouts.mask_NT), moved.group_N * 5 + shift
    rewards = RewardOutput(batch.rewards.rewards_N[order_N], pad(batch.rewards.rewards_NT))
    got = Given(moved, rewards, pad(batch.values_NT)).credit(advantage).advantages_NT
    torch.testing.assert_close(got, pad(expected_NT), atol=3e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# published numbers
# ----------------------------------------------------------------------------------------------------------------------


def openrlhf_example() -> Given:
    """Rewards (1, 0 | 1, 1), a KL of 0.05 per token, beta 0.1; second samples are one token shorter."""
    rollouts = make_batch([4, 3, 4, 3], groups=[0, 0, 1, 1])
    return Given(
        rollouts, RewardOutput(torch.tensor([1.0, 0.0, 1.0, 1.0]), -0.005 * rollouts.mask_NT), torch.zeros(4, 4)
    )


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (RLOOAdvantage(per_token="after"), [0.98, 0.985, 0.99, 0.995]),
        (GRPOAdvantage(), [0.6871, 0.6921, 0.6971, 0.7021]),
        (DrGRPOAdvantage(), [0.48, 0.485, 0.49, 0.495]),
        (ReinforcePPBaselineAdvantage(), [1.2987, 1.3129, 1.3272, 1.3414]),
        (ReinforcePPAdvantage(), [0.5022, 0.5144, 0.5266, 0.5388]),
    ],
    ids=repr,
)
def test_openrlhf_gives_these_numbers(advantage, expected):
    assert openrlhf_example().credit(advantage).advantages_NT[0].tolist() == pytest.approx(expected, abs=5e-5)


def test_gae_gives_the_numbers_of_openrlhf_and_of_repulse():
    rollouts = make_batch([3])
    rewards = RewardOutput(torch.tensor([1.0]))
    credit = Given(rollouts, rewards, torch.tensor([[0.1, 0.2, 0.3]])).credit(
        GAEAdvantage(gamma=0.99, lam=0.95, whiten="none")
    )
    assert credit.advantages_NT[0].tolist() == pytest.approx([0.808407, 0.755350, 0.7], abs=1e-6)
    assert credit.returns_NT[0].tolist() == pytest.approx([0.908407, 0.955350, 1.0], abs=1e-6)

    rewards = RewardOutput(torch.tensor([1.0]), torch.tensor([[-0.02, 0.03, 0.0]]))
    for how, expected in (("none", [0.40575, 1.185, 0.9]), ("std", [-1.3186179051, 1.1019545391, 0.2166633660])):
        credit = Given(rollouts, rewards, torch.tensor([[0.5, -0.2, 0.1]])).credit(GAEAdvantage(whiten=how))
        assert credit.advantages_NT[0].tolist() == pytest.approx(expected, abs=1e-6)
        assert credit.returns_NT[0].tolist() == pytest.approx([0.90575, 0.985, 1.0], abs=1e-6)


def test_leave_one_out_gives_the_numbers_of_repulse():
    scores_N = torch.tensor([3.4409993267, -0.1481933363, -2.4141931037, 1.7004161605])
    rollouts = make_batch([2] * 4, groups=[0] * 4)
    advantages_NT = Given(rollouts, RewardOutput(scores_N), torch.zeros(4, 2)).credit(RLOOAdvantage()).advantages_NT
    expected = [3.7283227532, -1.0572674641, -4.0786004874, 1.4075451983]
    assert advantages_NT[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# gaps, scans, ranks, mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_environment_tokens_take_no_time(lam):
    """Without its environment tokens a completion earns the same credit: nothing is bootstrapped from zero in a gap."""
    gapped, plain = make_batch([6]), make_batch([3])
    gapped.mask_NT = torch.tensor([[True, False, False, True, False, True]])
    values_NT = torch.tensor([[0.5, 9.0, 9.0, 0.4, 9.0, 0.3]])
    rewards = RewardOutput(torch.tensor([1.0]))
    with_gap = Given(gapped, rewards, values_NT).credit(GAEAdvantage(gamma=0.9, lam=lam, whiten="none"))
    without = Given(plain, rewards, torch.tensor([[0.5, 0.4, 0.3]])).credit(
        GAEAdvantage(gamma=0.9, lam=lam, whiten="none")
    )
    assert with_gap.advantages_NT[gapped.mask_NT].tolist() == pytest.approx(without.advantages_NT[0].tolist(), abs=1e-6)


def test_a_reward_on_an_environment_token_belongs_to_the_action_before_it():
    mask_NT = torch.tensor([[False, True, False, True, False]])
    rewards_NT = torch.tensor([[7.0, 0.0, 1.0, 0.0, 2.0]])  # 7 comes before any action
    assert discounted_returns(rewards_NT, mask_NT, 0.5)[0].tolist() == [0.0, 2.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.999, 1.0])
def test_the_scan_is_as_exact_as_a_loop_in_float64(decay):
    deltas_NT = torch.randn(2, 1500, generator=torch.Generator().manual_seed(0))
    expected_NT = deltas_NT.double().clone()
    for t in reversed(range(1499)):
        expected_NT[:, t] += decay * expected_NT[:, t + 1]
    error = (scan(deltas_NT, decay) - expected_NT).abs().max() / expected_NT.abs().max()
    assert error < 1e-6


class Ranks(World):
    """Threads that sum over each other."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.barrier_ = rank, len(board), board, barrier

    def gather(self, thing: Any) -> list[Any]:
        self.board[self.rank] = thing
        self.barrier_.wait(120)
        everything = list(self.board)
        self.barrier_.wait(120)
        return everything

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(tensor.clone())).sum(0)


@pytest.mark.parametrize(
    "advantage",
    [
        GAEAdvantage(),
        ReinforcePPAdvantage(),
        ReinforcePPAdvantage(whiten="mean"),
        ReinforcePPBaselineAdvantage(),
        BatchMeanAdvantage(),
    ],
    ids=repr,
)
def test_whitening_is_over_all_ranks(advantage):
    whole = given_batch()
    expected_NT = whole.credit(advantage).advantages_NT
    barrier, board, got = threading.Barrier(2), [None, None], {}

    def rank(number: int, rows: slice) -> None:
        mine = whole.rollouts.rows(torch.arange(6)[rows])
        mine.mask_NT = whole.rollouts.mask_NT[rows]
        mine.world = Ranks(number, board, barrier)
        rewards = RewardOutput(whole.rewards.rewards_N[rows], whole.rewards.rewards_NT[rows])
        got[number] = Given(mine, rewards, whole.values_NT[rows]).credit(advantage).advantages_NT

    threads = [
        threading.Thread(target=rank, args=(0, slice(0, 3))),
        threading.Thread(target=rank, args=(1, slice(3, 6))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([got[0], got[1]]), expected_NT, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "advantage",
    [
        GRPOAdvantage(),
        RLOOAdvantage(),
        ReinforcePPBaselineAdvantage(),
        MaxRLAdvantage(),
        BestOfNAdvantage(),
        PairsAdvantage(),
    ],
    ids=repr,
)
def test_comparing_needs_someone_to_compare_with(advantage):
    rollouts = make_batch([2, 2])
    with pytest.raises(UsageError, match="set sampling"):
        Given(rollouts, RewardOutput(torch.tensor([1.0, 2.0])), torch.zeros(2, 2)).credit(advantage)


# ----------------------------------------------------------------------------------------------------------------------
# judgments and teachers
# ----------------------------------------------------------------------------------------------------------------------


def judged(advantage: KTOAdvantage, labels: list[object], progress: float = 0.5) -> Credit:
    """Log-ratios of 2, 1, -4 and 3 nats over two tokens each."""
    rollouts = make_batch([2] * 4)
    rollouts.labels, rollouts.step = labels, StepInfo(progress=progress)
    logprobs_NT = torch.tensor([[1.0, 1.0], [0.5, 0.5], [-1.0, -3.0], [3.0, 0.0]]) - 7
    extras = {"actor.logprobs_NT": logprobs_NT, "ref_logprobs_NT": torch.full((4, 2), -7.0)}
    return advantage(RewardOutput(torch.zeros(4)), rollouts, extras)


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        ("other", [2.0, 0.0, 2.0, 0.0]),  # of undesirable rows below 0, so 0
        ("batch", [0.5, 0.5, 0.5, 0.5]),
        ("zero", [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_kto_compares_with_what_was_to_be_expected(z, expected):
    """Desirable are rows 0 and 2 (mean -1), undesirable 1 and 3 (mean 2); their weights 1 and 3."""
    credit = judged(KTOAdvantage(undesirable=3.0, z=z), [True, False, 1, 0])
    assert credit.advantages_NT[:, 0].tolist() == [1, -3, 1, -3]
    assert credit.returns_NT[:, 1].tolist() == pytest.approx(expected)


def test_kto_with_one_class_only_is_refused_at_the_start_and_survived_later():
    with pytest.raises(UsageError, match="first batch has only desirable ones"):
        judged(KTOAdvantage(z="other"), [True] * 4, progress=0.0)
    assert not judged(KTOAdvantage(z="other"), [True] * 4).returns_NT.any()
    with pytest.raises(UsageError, match="labels that are true, false or a number"):
        judged(KTOAdvantage(z="other"), ["good"] * 4)


def test_a_teacher_s_credit_is_how_much_more_it_believes_in_each_token():
    batch = given_batch()
    mask_NT = batch.rollouts.mask_NT
    teacher_NT, own_NT = torch.randn(2, *mask_NT.shape, generator=torch.Generator().manual_seed(1))
    extras = {"teacher.logprobs_NT": teacher_NT, "sampler_logprobs_NT": own_NT}
    silent = RewardOutput(batch.rewards.rewards_N)
    advantages_NT = TeacherAdvantage()(silent, batch.rollouts, extras).advantages_NT
    torch.testing.assert_close(advantages_NT, torch.where(mask_NT, teacher_NT - own_NT, 0.0))
    whole_NT = TeacherAdvantage(gamma=1.0, reward=2.0)(silent, batch.rollouts, extras).advantages_NT
    gap_N = torch.where(mask_NT, teacher_NT - own_NT, 0.0).sum(1)
    torch.testing.assert_close(whole_NT[:, 0], gap_N + 2 * batch.rewards.rewards_N)


def test_a_teacher_s_credit_weighs_per_token_rewards_too_and_leaves_a_penalty_alone():
    batch = given_batch()
    mask_NT, own_NT = batch.rollouts.mask_NT, batch.rewards.rewards_NT
    same_NT = torch.zeros(mask_NT.shape)
    extras = {"teacher.logprobs_NT": same_NT, "sampler_logprobs_NT": same_NT}
    assert not TeacherAdvantage()(batch.rewards, batch.rollouts, extras).advantages_NT.any(), "it imitates only"
    whole_NT = TeacherAdvantage(gamma=1.0, reward=2.0)(batch.rewards, batch.rollouts, extras).advantages_NT
    torch.testing.assert_close(whole_NT[:, 0], 2 * (batch.rewards.rewards_N + own_NT.sum(1)))
    penalty_NT = 0.1 * mask_NT
    penalized = replace(batch.rewards, rewards_NT=own_NT - penalty_NT)
    found_NT = TeacherAdvantage(gamma=1.0)(penalized, batch.rollouts, extras | {"penalty_NT": penalty_NT}).advantages_NT
    torch.testing.assert_close(found_NT[:, 0], -penalty_NT.sum(1), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# selections
# ----------------------------------------------------------------------------------------------------------------------


def selection(advantage: Any, scores: list[float], groups: list[int]) -> Credit:
    rollouts = make_batch([2] * len(scores), groups=groups)
    return Given(rollouts, RewardOutput(torch.tensor(scores)), torch.zeros(len(scores), 2)).credit(advantage)


def mean(metric: Metric) -> float:
    return float(metric.total / metric.count)


def test_the_best_of_each_group_is_trained_on_and_ties_go_to_the_first():
    credit = selection(BestOfNAdvantage(), [1.0, 3.0, 3.0, 5.0, 2.0, -1.0], [4, 4, 4, 1, 1, 9])
    assert credit.rows.tolist() == [1, 3, 5]
    assert credit.advantages_NT[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert mean(credit.metrics["reward/kept"]) == pytest.approx((3 + 5 - 1) / 3)
    assert selection(BestOfNAdvantage(keep=2), [1.0, 3.0, 2.0, 5.0], [0, 0, 0, 0]).rows.tolist() == [1, 3]


def test_selections_are_by_the_whole_reward():
    """1 + 2 x 2 is more than 3: what is given token by token counts."""
    rewards = RewardOutput(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([[2.0, 2], [0, 0], [-1, -1]]))
    batch = Given(make_batch([2] * 3, groups=[0, 0, 0]), rewards, torch.zeros(3, 2))
    assert batch.credit(BestOfNAdvantage()).rows.tolist() == [0]
    assert mean(batch.credit(BestOfNAdvantage()).metrics["reward/kept"]) == 5
    assert batch.credit(PairsAdvantage()).rows.tolist() == [0, 2]


def test_pairs_are_the_best_and_the_worst_and_equal_ones_are_none():
    credit = selection(PairsAdvantage(), [1.0, 3.0, 2.0, 5.0, 5.0, 0.0, 9.0], [0, 0, 0, 1, 1, 2, 2])
    assert credit.rows.tolist() == [1, 0, 6, 5]
    assert credit.advantages_NT[:, 1].tolist() == [-1, 1, 0, 0, 0, -1, 1]
    assert mean(credit.metrics["pairs/share"]) == pytest.approx(2 / 3)
    assert selection(PairsAdvantage(min_gap=5.0), [1.0, 3.0, 0.0, 9.0], [0, 0, 1, 1]).rows.tolist() == [3, 2]
    assert selection(PairsAdvantage(), [1.0, 1.0], [0, 0]).rows.tolist() == []


@pytest.mark.parametrize(("n", "p"), [(2, 0.5), (3, 0.2), (5, 0.7), (6, 0.01)])
def test_maxrl_climbs_the_log_likelihood_of_success_to_the_order_that_its_samples_allow(n, p):
    """Enumerate all outcomes of n samples of one choice between success and failure, whose score is d log pi / d p."""
    rollouts = make_batch([1] * n, groups=[0] * n)
    gradient = 0.0
    for outcome in itertools.product([1.0, 0.0], repeat=n):
        advantages_NT = Given(rollouts, RewardOutput(torch.tensor(outcome)), torch.zeros(n, 1)).credit(MaxRLAdvantage())
        score = [1 / p if success else -1 / (1 - p) for success in outcome]
        step = statistics.fmean(a * s for a, s in zip(advantages_NT.advantages_NT[:, 0].tolist(), score))
        gradient += math.prod(p if success else 1 - p for success in outcome) * step
    assert gradient == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, n)), rel=1e-5)


def test_maxrl_refuses_rewards_that_it_cannot_divide_by():
    rollouts = make_batch([1, 1], groups=[0, 0])
    with pytest.raises(UsageError, match="a reward is negative; use a reward of 0 or 1"):
        Given(rollouts, RewardOutput(torch.tensor([1.0, -1.0])), torch.zeros(2, 1)).credit(MaxRLAdvantage())


def test_large_offsets_of_the_reward_do_not_cost_precision():
    """GRPO of scores near 1e4 is GRPO of the same scores near 0."""
    rollouts = make_batch([1] * 4, groups=[0] * 4)
    small_N = torch.tensor([0.0, 0.25, 0.5, 1.0])
    near, far = (
        Given(rollouts, RewardOutput(scores_N), torch.zeros(4, 1)).credit(GRPOAdvantage()).advantages_NT
        for scores_N in (small_N, small_N + 8192.0)
    )
    torch.testing.assert_close(far, near)
    assert math.isclose(float(near.square().sum() / 3), 1.0, rel_tol=1e-5)
