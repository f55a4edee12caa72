"""RePULSe against closed forms: REINFORCE, reward transformations and the negative term, on the published fixture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from repulse_fixture import (
    ALL,
    ORIGINAL,
    P0,
    P_SAMPLES,
    Q_SAMPLES,
    TARGET,
    P,
    Q,
    Table,
    credit,
    loss_of,
    near,
    on_q,
    reduced,
    reward,
    rollouts,
    sigma,
    weights,
)
from torch import Tensor

from rlhf_algos.advantage.gae import GAEAdvantage
from rlhf_algos.advantage.negative import NegativeAdvantage
from rlhf_algos.advantage.rloo import RLOOAdvantage
from rlhf_algos.advantage.transformed import TransformedAdvantage
from rlhf_algos.groups import leave_one_out
from rlhf_algos.loss.reinforce import ReinforceLoss
from rlhf_algos.loss.weighted_nll import WeightedNLLLoss
from rlhf_algos.target import Target, anneal
from rlhf_core import make_config
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.training.planner import make_plan

# ----------------------------------------------------------------------------------------------------------------------
# REINFORCE, reward transformations, the negative term
# ----------------------------------------------------------------------------------------------------------------------

RETURNS = {
    0.0: [3.4409993267, -0.1481933363, -2.4141931037, 1.7004161605],
    0.2: [3.4253800976, -0.0391037747, -1.9889195473, 1.9481198160],
}
ADVANTAGES = {
    0.0: [3.7283227532, -1.0572674641, -4.0786004874, 1.4075451983],
    0.2: [3.4520145996, -1.1672972301, -3.7670515936, 1.4823342242],
}


def returns(c: float) -> Tensor:
    return reward(P_SAMPLES) - c * (P(P_SAMPLES) - P0(P_SAMPLES)).sum(1)


def reinforce(c: float, p: Table, scale: str = "sequence") -> Tensor:
    batch = rollouts(P_SAMPLES)
    loss = ReinforceLoss(aggregate="sequence") if scale == "sequence" else ReinforceLoss()
    batch = batch.with_extras(advantages_NT=leave_one_out(returns(c), batch.group_N)[:, None].expand(4, 2))
    return reduced(loss({"logprobs_NT": p(P_SAMPLES)}, batch), batch)


@pytest.mark.parametrize("c", [0.0, 0.2])
def test_returns_and_leave_one_out_advantages_are_the_published_ones(c):
    near(returns(c), RETURNS[c])
    near(leave_one_out(returns(c), torch.zeros(4)), ADVANTAGES[c])
    penalty_NT = -c * (P(P_SAMPLES) - P0(P_SAMPLES))
    batch = rollouts(P_SAMPLES)
    whole = RLOOAdvantage()(RewardOutput(reward(P_SAMPLES), penalty_NT), batch, {}).advantages_NT
    near(whole[:, 0], ADVANTAGES[c], 1e-6)  # credit is float32


def test_reinforce_has_the_published_loss_and_gradient():
    p = P.live()
    near(reinforce(0.0, p), -0.4574873124)
    near(reinforce(0.2, p), -0.4070978073)
    near(p.grads(reinforce(0.0, p))[0], [0, -0.4660403442, 0.1321584330, 0, 0, 0.5098250609, -0.1759431498, 0])


def test_leave_one_out_is_unbiased_by_enumeration_of_all_pairs():
    p = P.live()
    exact = p.grads(p(ALL).sum(1).exp() @ reward(ALL))
    prob, r = P(ALL).sum(1).exp(), reward(ALL)
    per_output = prob * r - prob * (prob @ r)  # sum over partners of p_i p_j (r_i - r_j): two halves that are equal
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    A = leave_one_out(r[pairs].flatten(), torch.arange(4096).repeat_interleave(2)).view(-1, 2)
    weight = (prob[pairs].prod(1, keepdim=True) * A / 2).flatten()
    summed = torch.zeros(64, dtype=torch.float64).index_add(0, pairs.flatten(), weight)
    near(summed, per_output, 1e-12)
    for found, expected in zip(p.grads(summed @ p(ALL).sum(1)), exact):
        near(found, expected, 1e-12)


def test_a_penalty_in_the_reward_has_the_true_gradient_of_the_divergence():
    p, c = P.live(), 0.2
    prob, ratio = P(ALL).sum(1).exp(), (P(ALL) - P0(ALL)).sum(1)
    score = p.grads((prob * (reward(ALL) - c * ratio)) @ p(ALL).sum(1))
    live = p(ALL).sum(1)
    true = p.grads(live.exp() @ (reward(ALL) - c * (live - P0(ALL).sum(1))))
    near((live.exp() @ (reward(ALL) - c * (live - P0(ALL).sum(1)))), 0.6915855154)
    for found, expected in zip(score, true):
        near(found, expected, 1e-12)


def test_transformed_rewards_are_the_published_ones():
    r = reward(P_SAMPLES)
    near(TransformedAdvantage(1.0, -1.0).transform(r), [3.4089666685, -1.3079304303, -13.5949381190, 1.5178086463])
    near(TransformedAdvantage(0.3, -0.5).transform(r), [3.3873063175, -0.4712666073, -3.4173217352, 1.5722183591])
    near(TransformedAdvantage(2.0, threshold=-0.5).transform(r), r - torch.tensor([0, 0, 2, 0]))
    assert TransformedAdvantage().transform(torch.tensor([-1e4])).isfinite().all(), "float32 too"


def test_transformed_credit_leaves_the_penalty_and_the_logged_reward_alone():
    batch, r = rollouts(P_SAMPLES), reward(P_SAMPLES)
    penalty_NT = torch.linspace(-1, 1, 8).view(4, 2)
    rewards = RewardOutput(r, penalty_NT)
    found = TransformedAdvantage(1.0, -1.0)(rewards, batch, {"penalty_NT": -penalty_NT}).advantages_NT
    near(found[:, 0], leave_one_out(r - (-r).exp() + penalty_NT.sum(1), batch.group_N), 1e-5)
    near(rewards.rewards_N, reward(P_SAMPLES), 0)
    own_NT = torch.linspace(0, 2, 8).view(4, 2)
    both, whole = RewardOutput(r, own_NT + penalty_NT), r + own_NT.sum(1)
    found = TransformedAdvantage(1.0, -1.0)(both, batch, {"penalty_NT": -penalty_NT}).advantages_NT
    near(found[:, 0], leave_one_out(whole - (-whole).exp() + penalty_NT.sum(1), batch.group_N), 1e-5)


def test_ppo_s_reward_is_transformed_too():
    batch, r = rollouts(P_SAMPLES), reward(P_SAMPLES)
    values = {"values_NT": torch.linspace(0, 1, 8).view(4, 2)}
    found, plain = TransformedAdvantage(of="gae lam=0.5 whiten=none"), GAEAdvantage(lam=0.5, whiten="none")
    assert found.needs == GAEAdvantage.needs and found.min_samples == 1 and TransformedAdvantage().min_samples == 2
    expected = plain(RewardOutput(r - (-r).exp()), batch, values)
    near(found(RewardOutput(r), batch, values).advantages_NT, expected.advantages_NT, 0)
    near(found(RewardOutput(r), batch, values).returns_NT, expected.returns_NT, 0)
    plan = make_plan(make_config("ppo", model="tiny", advantage={"use": "transformed", "of": "gae"}))
    assert set(plan.roles) >= {"actor", "critic"}
    with pytest.raises(UsageError, match="ppo trains a critic"):
        make_plan(make_config("ppo", model="tiny", advantage="transformed"))
    with pytest.raises(UsageError, match="of 'gae lamb=1': gae has no option 'lamb'"):
        TransformedAdvantage(of="gae lamb=1").needs  # noqa: B018  the property is what asks


def test_repulse_is_reinforce_on_a_transformed_reward_in_expectation():
    """r - (alpha / Z) phi, with the proposal equal to the policy (appendix C.3); and the published gradient."""
    p, alpha = P.live(), 0.1
    target, log_z = sigma(-1)
    prob, r, log_p = P(ALL).sum(1).exp(), reward(ALL), p(ALL).sum(1)
    repulse = p.grads(-(prob * (r - prob @ r)) @ log_p + alpha * target @ log_p)
    transformed = r - alpha / log_z.exp() * (-r).exp()
    near(alpha / log_z.exp(), 0.0576069953)
    for found, expected in zip(repulse, p.grads(-(prob * transformed) @ log_p)):
        near(found, expected, 1e-12)
    near(repulse[0], [-0.0306089607, -0.1676477459, -0.1270856693, 0.1259835971, 0.2299878991, 0.0816888109,
                      -0.0430822555, -0.0692356757])  # fmt: skip


def test_the_negative_term_has_the_published_losses_and_gradients():
    p, batch, negative = P.live(), on_q(Q_SAMPLES), NegativeAdvantage(TARGET, alpha=0.1)
    original = loss_of(ORIGINAL, negative, batch, p)
    near(reinforce(0.0, p) + original, -0.5271589850)
    near(reinforce(0.2, p) + original, -0.4767694799)
    near(p.grads(reinforce(0.0, p) + original)[0],
         [-0.0023036435, -0.4693956013, 0.1297127443, 0.0060331464, 0.0033977037, 0.5093567705, -0.1764576337,
          -0.0003434864])  # fmt: skip
    paper = reinforce(0.0, p, "paper") + loss_of(WeightedNLLLoss(), negative, batch, p)
    near(paper, -1.4723480055)
    near(p.grads(paper)[0],
         [-0.0184291480, -0.9589227452, 0.2447513562, 0.0482651710, 0.0271816298, 1.0159037981, -0.3560021706,
          -0.0027478914])  # fmt: skip


def test_without_alpha_nothing_is_negative_and_with_it_the_target_s_samples_lose():
    batch = on_q(Q_SAMPLES)
    assert not credit(NegativeAdvantage(TARGET, alpha=0.0), batch).any()
    p = P.live()
    (first, second), w = (
        p.grads(loss_of(WeightedNLLLoss(), NegativeAdvantage(TARGET, alpha=1.0), batch, p)),
        weights(-1)[1],
    )
    moved = Table(P.first_V - 0.01 * first, P.second_VV - 0.01 * second)
    assert w @ moved(Q_SAMPLES).sum(1) < w @ P(Q_SAMPLES).sum(1)


def test_the_policy_s_own_samples_weigh_by_reward_alone_and_need_no_forward_pass():
    base = NegativeAdvantage(TARGET, alpha=1.0, weighting="reward")
    assert base.needs == frozenset()
    near(credit(base, rollouts(P_SAMPLES))[:, 0], -(-reward(P_SAMPLES)).softmax(0), 1e-12)


def test_other_weightings():
    batch = on_q(Q_SAMPLES)
    near(credit(NegativeAdvantage(TARGET, alpha=1.0, weighting="uniform"), batch), -0.25, 1e-12)
    reinforced = credit(NegativeAdvantage(TARGET, alpha=0.5, objective="reinforce"), batch)[:, 0]
    w, r = weights(-1)[1], reward(Q_SAMPLES)
    near(reinforced, 0.5 * w * (r - w @ r), 1e-12)


def test_an_indicator_weighs_bad_samples_only_and_none_without_one():
    batch = on_q(Q_SAMPLES)
    threshold = float(reward(Q_SAMPLES).median()) + 1e-6
    bad = reward(Q_SAMPLES) < threshold
    ratio = (P(Q_SAMPLES) - Q(Q_SAMPLES)).sum(1).exp() * bad
    target = Target(potential="indicator", threshold=threshold)
    near(credit(NegativeAdvantage(target, alpha=1.0), batch)[:, 0], -ratio / ratio.sum(), 1e-12)
    assert not credit(NegativeAdvantage(replace(target, threshold=-100.0), alpha=1.0), batch).any()


def test_potentials():
    r = torch.tensor([-3.0, 0.5], dtype=torch.float64)
    near(Target(beta=-2.0).log_potential(r, 0.0), -2 * r)
    near(Target(beta=-2.0, reward_cap=0.0).log_potential(r, 0.0), [6.0, 0.0])
    near(Target(beta=2.0, potential="toxicity").log_potential(r, 0.0), 2 * (1 - r.sigmoid()).log())
    near(Target(beta=-8.0, start_beta=-2.0).log_potential(r, 0.5), -4 * r)
    near(anneal(0.01, 1.0, 0.25), 10**-1.5)
    with pytest.raises(UsageError, match="the same sign and not be 0"):
        Target(beta=-8.0, start_beta=2.0)
