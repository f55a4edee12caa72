"""RePULSe against closed forms: tabular models with 64 outputs, a tiny transformer with all of its outputs enumerated.

The numbers come from an implementation that shares no code with this one; "original scale" is the mean over completions
of token means that the released code uses. Everything is float64 and exact to 1e-9 unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_algos.advantage.ctl import CTL
from rlhf_algos.advantage.negative import Negative
from rlhf_algos.advantage.rloo import RLOO
from rlhf_algos.advantage.transformed import Transformed
from rlhf_algos.groups import leave_one_out
from rlhf_algos.importance import about_weights, group_log_softmax, log_weights, twist_log_weights
from rlhf_algos.loss.reinforce import Reinforce
from rlhf_algos.loss.weighted_nll import WeightedNLL
from rlhf_algos.target import Target, annealed
from rlhf_core.errors import UsageError
from rlhf_core.reduce import count, weighted_sum
from rlhf_core.testing.batches import make_batch
from rlhf_core.types import LossTerms, RewardOutput, Rollouts

TARGET = Target(beta=-1.0)
ALL = torch.cartesian_prod(torch.arange(8), torch.arange(8))
"""Every output of the fixture, (a, b) in the order of 8 a + b."""
Q_SAMPLES = torch.tensor([(0, 1), (3, 5), (7, 2), (4, 4)])
P_SAMPLES = torch.tensor([(1, 1), (2, 6), (5, 0), (6, 3)])
BAD = [3, 6]


def near(value: Any, expected: Any, atol: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    torch.testing.assert_close(value, expected.expand_as(value), atol=atol, rtol=0)


@dataclass(eq=False)
class Table:
    """A model of two tokens: logits of the first, and of the second after each first one."""

    first_V: Tensor
    second_VV: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Log-probabilities (N, 2) of outputs (N, 2)."""
        first, second = self.first_V.log_softmax(0), self.second_VV.log_softmax(1)
        return torch.stack([first[outputs[:, 0]], second[outputs[:, 0], outputs[:, 1]]], 1)

    def live(self) -> Table:
        """A copy that collects gradients."""
        return Table(*(logits.clone().requires_grad_() for logits in (self.first_V, self.second_VV)))

    def grads(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.autograd.grad(loss, (self.first_V, self.second_VV), retain_graph=True, allow_unused=True)
        first, second = (torch.zeros_like(x) if g is None else g for x, g in zip((self.first_V, self.second_VV), found))
        return first, second


v = torch.arange(8, dtype=torch.float64)
u = v[:, None]
P = Table((1 + 0.7 * v).sin(), (3.1 + 1.3 * u + 0.7 * v).sin())
Q = Table((0.5 + 0.9 * v).cos(), (2.2 - 0.4 * u + 0.9 * v).cos())
P0 = Table(0.5 * (0.3 * v).sin(), 0.5 * (0.4 + 0.3 * v - 0.9 * u).sin())


def reward(outputs: Tensor) -> Tensor:
    a, b = outputs.double().unbind(1)
    return 2 * (1.1 * a + 0.3).sin() + 1.5 * (0.8 * b - 0.6 * a).cos()


def sigma(beta: float, p: Table = P) -> tuple[Tensor, Tensor]:
    """The target's probabilities of all outputs, and log Z."""
    log_unnormalised = p(ALL).sum(1) + beta * reward(ALL)
    log_z = log_unnormalised.logsumexp(0)
    return (log_unnormalised - log_z).exp(), log_z


def rollouts(outputs: Tensor, extras: Mapping[str, Tensor] | None = None, groups: list[int] | None = None) -> Rollouts:
    batch = make_batch([2] * len(outputs), groups=groups or [0] * len(outputs))
    batch.tokens_NT = outputs
    return batch.with_extras(**(extras or {}))


def on_q(outputs: Tensor, p: Table = P, q: Table = Q) -> Rollouts:
    return rollouts(outputs, {"actor.logprobs_NT": p(outputs).detach(), "old_logprobs_NT": q(outputs).detach()})


def credit(advantage: Any, batch: Rollouts, rewards_N: Tensor | None = None) -> Tensor:
    rewards = RewardOutput(reward(batch.tokens_NT) if rewards_N is None else rewards_N)
    return advantage(rewards, batch, batch.extras).advantages_NT  # type: ignore[no-any-return]


def reduced(terms: LossTerms, batch: Rollouts) -> Tensor:
    """Core's reduction in float64; that core agrees is asserted on the way."""
    mask, N = batch.mask_NT, len(batch)
    values = terms.values.masked_fill(~mask, 0.0)
    match terms.reduction.per:
        case "sequence":
            total = (values.sum(1) / mask.sum(1)).sum() / N
        case "prompt":
            total = values.sum() / len(batch.group_N.unique())
        case _:
            total = values.sum() / (N * terms.reduction.length)
    near(weighted_sum(terms.values, terms.reduction, batch) / count(terms.reduction, batch), total.detach(), atol=1e-5)
    return total


def loss_of(loss: Any, advantage: Any, batch: Rollouts, model: Table, minus: Tensor | float = 0.0) -> Tensor:
    """`loss` on the credit of `advantage`; `minus` is a constant taken off the log-probabilities (log psi is log q - log p)."""
    batch = batch.with_extras(advantages_NT=credit(advantage, batch))
    return reduced(loss({"logprobs_NT": model(batch.tokens_NT) - minus}, batch), batch)


ORIGINAL = WeightedNLL("sequence")

# ----------------------------------------------------------------------------------------------------------------------
# the fixture itself, and the weights
# ----------------------------------------------------------------------------------------------------------------------


def test_the_fixture_is_the_published_one():
    p, q = P(ALL).sum(1).exp(), Q(ALL).sum(1).exp()
    near(p @ reward(ALL), 0.8071181214)
    near(q @ reward(ALL), 0.2782913508)
    near(p @ (P(ALL) - P0(ALL)).sum(1), 0.5776630299)
    target, log_z = sigma(-1)
    near(log_z, 0.5515261792)
    near(target @ reward(ALL), -2.0009903597)
    near(target @ (target.log() - Q(ALL).sum(1)), 1.5479985838)
    extreme, log_z = sigma(-10)
    near(log_z, 30.5098272346)
    near(extreme.max(), 0.9637792857)


def test_weights_average_to_the_normaliser_under_any_proposal():
    target, log_z = sigma(-1)
    every = log_weights(P(ALL), Q(ALL), TARGET.log_potential(reward(ALL), {}), torch.ones(64, 2).bool())
    q = Q(ALL).sum(1).exp()
    near(q @ every.exp(), log_z.exp(), 1e-12)
    near(q @ every, log_z - q @ (q.log() - target.log()), 1e-12)
    near(q @ every, -1.2742668180)
    near(target @ every, log_z + target @ (target.log() - q.log()), 1e-12)
    near(target @ every, 2.0995247631)


def weights(beta: float, p: Table = P, q: Table = Q) -> tuple[Tensor, Tensor]:
    log_w = log_weights(p(Q_SAMPLES), q(Q_SAMPLES), beta * reward(Q_SAMPLES), torch.ones(4, 2).bool())
    return log_w, group_log_softmax(log_w, torch.zeros(4)).exp()


def test_self_normalised_weights_are_the_published_ones():
    log_w, w = weights(-1)
    near(log_w, [-1.1750689482, 1.3553751218, -1.3043295879, 0.7676256458])
    near(w, [0.0466954687, 0.5864522206, 0.0410334049, 0.3258189058])
    metrics = about_weights(log_w, torch.zeros(4), None, "repulse")
    near(metrics["repulse/ess"], 2.2028936733)


def test_an_extreme_beta_does_not_overflow():
    _, w = weights(-10)
    near(w[[1, 3]], [0.9996311695, 0.0003688305])
    assert w[[0, 2]].max() < 1e-9
    _, w = weights(-1e6)
    assert w.isfinite().all()


def test_weights_ignore_constants_and_are_a_softmax_of_rewards_for_the_policy_s_own_samples():
    _, w = weights(-1)
    shifted = Table(P.first_V + 3, P.second_VV)
    near(weights(-1, shifted)[1], w, 1e-12)
    log_w, _ = weights(-1)
    near(group_log_softmax(log_w + 700, torch.zeros(4)).exp(), w, 1e-12)
    near(weights(-1, P, P)[1], (-reward(Q_SAMPLES)).softmax(0), 1e-12)


def test_self_normalisation_has_the_bias_that_enumeration_says():
    first, second = torch.cartesian_prod(torch.arange(64), torch.arange(64)).unbind(1)
    every = log_weights(P(ALL), Q(ALL), -reward(ALL), torch.ones(64, 2).bool())
    pairs = torch.stack([first, second], 1)
    estimates = (every[pairs].softmax(1) * reward(ALL)[pairs]).sum(1)
    near(Q(ALL).sum(1).exp()[pairs].prod(1) @ estimates, -0.2200458012)


def test_groups_of_different_sizes_are_weighed_by_themselves():
    log_w = torch.tensor([1.0, 2.0, -1.0, 0.5, 700.0, 3.0], dtype=torch.float64)
    group = torch.tensor([5, 5, 2, 2, 2, 9])
    found = group_log_softmax(log_w, group).exp()
    near(found[:2], log_w[:2].softmax(0), 1e-12)
    near(found[2:5], log_w[2:5].softmax(0), 1e-12)
    near(found[5], 1.0)


def test_what_is_outside_the_mask_has_no_weight():
    p = torch.tensor([[-1, -2, -1.5], [-1, 77, -3]]).double()
    q = torch.tensor([[-1.2, -1.8, -1.4], [-1.1, 0, 0]]).double()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_w = log_weights(p, q, torch.tensor([0.3, 0.4]), mask)
    near(group_log_softmax(log_w, torch.zeros(2)).exp(), [0.4256, 0.5744], 5e-5)
    noise = log_weights(torch.where(mask, p, -1e9), torch.where(mask, q, torch.nan), torch.tensor([0.3, 0.4]), mask)
    near(noise, log_w, 0)


def test_the_weight_of_a_finished_completion_stays():
    p, q = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0)).double(), -torch.ones(2, 4)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    psi = (q - p).masked_fill(~mask, 0.0)
    twisted = twist_log_weights(p, q, psi, mask)
    whole = log_weights(p, q, torch.zeros(2), mask)
    near(twisted[:, 0], 0.0)
    near(twisted[1, 2:], whole[1])
    near(twisted[0, 3], (p - q)[0, :3].sum())


def test_estimates_about_the_weights_approach_the_true_divergences():
    """4e5 samples; the standard errors are below 0.01."""
    target, log_z = sigma(-1)
    q = Q(ALL).sum(1).exp()
    drawn = torch.multinomial(q, 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    every = log_weights(P(ALL), Q(ALL), -reward(ALL), torch.ones(64, 2).bool())
    metrics = about_weights(every[drawn], torch.zeros(400_000), None, "x")
    near(metrics["x/log_z"], log_z, 0.03)
    near(metrics["x/kl_proposal_target"], 1.8257929972, 0.03)
    near(metrics["x/kl_target_proposal"], 1.5479985838, 0.03)
    near(metrics["x/ess"] / 400_000, 1 / (target.square() / q).sum(), 0.01)


def test_weights_that_rest_on_one_sample_warn():
    with pytest.warns(UserWarning, match=r"raise --sampling\.n"):
        metrics = about_weights(
            torch.tensor([0.0, 50.0, 1.0, 1.0, 9.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2]), None, "x"
        )
    near(metrics["x/collapsed"], 2 / 3)


# ----------------------------------------------------------------------------------------------------------------------
# CTL
# ----------------------------------------------------------------------------------------------------------------------


def exact_kl_gradient(model: Table, prefix: int = 2) -> tuple[Tensor, Tensor]:
    """grad KL(sigma(s_1:prefix) || q(s_1:prefix)) by autograd through the sum over all outputs."""
    target, _ = sigma(-1)
    return model.grads(-(target @ model(ALL)[:, :prefix].sum(1)))


def test_the_positive_term_of_ctl_is_the_gradient_of_the_divergence_and_the_negative_one_vanishes():
    """By enumeration, for both parameterisations of the twist."""
    target, _ = sigma(-1)
    q = Q.live()
    p = P(ALL).detach()
    two = exact_kl_gradient(q)
    near(two[0], [0.1223224899, 0.0514373812, -0.0011101837, -0.1044642971, -0.4981831864, 0.0113823924, 0.2176412743,
                  0.2009741293])  # fmt: skip
    near(math.hypot(two[0].norm(), two[1].norm()), 0.6252959774)
    positive = q.grads(target @ q(ALL).sum(1))
    prefix_weight = torch.stack([Q(ALL).sum(1).exp(), Q(ALL).sum(1).exp() * (p - Q(ALL))[:, 0].exp()], 1)
    negative = q.grads((prefix_weight * q(ALL)).sum())
    for found, vanishing, expected in zip(positive, negative, two):
        near(found, -expected, 1e-12)
        near(vanishing, 0.0, 1e-12)
    cumulated = q.grads(target @ q(ALL).cumsum(1).sum(1))
    one = exact_kl_gradient(q, prefix=1)
    for found, first, second in zip(cumulated, one, two):
        near(found, -(first + second), 1e-12)


def test_prefix_weights_are_the_published_ones():
    p, q = P(Q_SAMPLES), Q(Q_SAMPLES)
    found = group_log_softmax(twist_log_weights(p, q, q - p, torch.ones(4, 2).bool()), torch.zeros(4)).exp()
    near(found[:, 0], 0.25)
    near(found[:, 1], [0.1911677105, 0.5606731545, 0.0571676701, 0.1909914649])
    uniform = group_log_softmax(
        twist_log_weights(p, q, (q - p).cumsum(1), torch.ones(4, 2).bool()), torch.zeros(4)
    ).exp()
    near(uniform, 0.25)


def test_the_sampled_ctl_loss_and_its_gradient_are_the_published_ones():
    q, batch = Q.live(), on_q(Q_SAMPLES)
    loss = loss_of(ORIGINAL, CTL(TARGET), batch, q, minus=P(Q_SAMPLES))
    near(loss, 0.0593124302)
    first, second = q.grads(loss)
    near(first, [0.0254130664, 0, 0, -0.0420565276, -0.0094773632, 0, 0, 0.0261208244])
    near(math.hypot(first.norm(), second.norm()), 0.0621304053)
    paper = q.grads(loss_of(WeightedNLL(), CTL(TARGET), batch, q))
    near(paper[0], 8 * first), near(paper[1], 8 * second)  # N = 4 samples of T = 2 tokens


def test_ctl_without_its_second_term_is_the_published_loss_and_dpg_in_gradient():
    q, batch, p = Q.live(), on_q(Q_SAMPLES), P(Q_SAMPLES)
    loss = loss_of(ORIGINAL, CTL(TARGET, contrast="none"), batch, q, minus=p)
    near(loss, -0.0382980967)
    _, w = weights(-1)
    first, second = q.first_V.log_softmax(0), q.second_VV.log_softmax(1)[Q_SAMPLES[:, 0]]
    p_first, p_second = P.first_V.log_softmax(0), P.second_VV.log_softmax(1)[Q_SAMPLES[:, 0]]
    expected = torch.stack([(first.exp().detach() @ (first - p_first)).expand(4),
                            (second.exp().detach() * (second - p_second)).sum(1)], 1)  # fmt: skip
    dpg = -(w[:, None] * (q(Q_SAMPLES) - p - expected)).mean(1).mean()
    near(dpg, 0.0956242875)
    for found, of_dpg in zip(q.grads(loss), q.grads(dpg)):
        near(found, of_dpg, 1e-12)


def test_twists_of_whole_prefixes_credit_early_tokens_for_all_that_follow():
    q, batch, p = Q.live(), on_q(Q_SAMPLES), P(Q_SAMPLES)
    loss = loss_of(ORIGINAL, CTL(TARGET, psi="q_p_s_1_to_t"), batch, q, minus=p)
    near(loss, 0.0618991754)
    _, w = weights(-1)
    written_out = -((w[:, None] - 0.25) * (q(Q_SAMPLES) - p).cumsum(1)).mean(1).mean()
    near(loss, written_out.detach(), 1e-12)
    for found, expected in zip(q.grads(loss), q.grads(written_out)):
        near(found, expected, 1e-12)


def test_an_unnormalised_twist_has_the_published_loss():
    """No role gives raw logits, so no credit offers it; the weights are general all the same."""
    p, q = P(Q_SAMPLES), Q(Q_SAMPLES)
    a, b = Q_SAMPLES.unbind(1)
    log_psi = torch.stack([Q.first_V[a], Q.second_VV[a, b]], 1) - p
    negative = group_log_softmax(twist_log_weights(p, q, log_psi, torch.ones(4, 2).bool()), torch.zeros(4)).exp()
    near(-((weights(-1)[1][:, None] - negative) * log_psi).mean(1).mean(), 0.0587506937)


def test_sixo_with_reweighted_negatives_has_the_gradient_of_the_published_loss():
    q, batch, p = Q.live(), on_q(Q_SAMPLES), P(Q_SAMPLES)
    _, w = weights(-1)
    u_ = (p - Q(Q_SAMPLES)).sum(1).softmax(0)
    log_psi = q(Q_SAMPLES) - p
    sixo = -(w[:, None] * log_psi.sigmoid().log() + u_[:, None] * (-log_psi).sigmoid().log()).mean(1).mean()
    near(sixo, 0.3763136214)
    for found, expected in zip(q.grads(loss_of(ORIGINAL, CTL(TARGET, contrast="sixo"), batch, q)), q.grads(sixo)):
        near(found, expected, 1e-12)


@pytest.mark.parametrize("contrast", ["prefix", "none"])
def test_the_sampled_gradient_converges_to_that_of_the_divergence(contrast):
    q = Q.live()
    drawn = torch.multinomial(
        Q(ALL).sum(1).exp(), 400_000, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    samples = ALL[drawn]
    batch = on_q(samples)
    found = q.grads(loss_of(WeightedNLL(), CTL(TARGET, contrast=contrast), batch, q))
    for mine, exact in zip(found, exact_kl_gradient(q)):
        near(mine, exact, 0.02)


def test_identical_samples_teach_ctl_nothing_and_weighted_likelihood_something():
    q, batch = Q.live(), on_q(Q_SAMPLES[[1, 1, 1, 1]])
    assert credit(CTL(TARGET), batch).abs().max() < 1e-15
    assert q.grads(loss_of(ORIGINAL, CTL(TARGET, contrast="none"), batch, q))[0].norm() > 0.01


def test_a_proposal_that_is_the_target_has_equal_weights():
    target = sigma(-1)[0].view(8, 8)
    found = Table(target.sum(1).log(), (target / target.sum(1, keepdim=True)).log())
    near(weights(-1, P, found)[1], 0.25, 1e-12)
    batch = on_q(Q_SAMPLES, q=found)
    q = found.live()
    for grad in q.grads(loss_of(ORIGINAL, CTL(TARGET, psi="q_p_s_1_to_t"), batch, q)):
        near(grad, 0.0, 1e-12)
    first, second = q.grads(loss_of(ORIGINAL, CTL(TARGET), batch, q))
    near(first, 0.0, 1e-12)
    near(second.abs().max(), 0.0303526737)


def test_only_the_proposal_s_log_probabilities_are_differentiated():
    batch = on_q(Q_SAMPLES)
    live = batch.with_extras(**{name: tensor.clone().requires_grad_() for name, tensor in batch.extras.items()})
    with torch.no_grad():
        found = credit(CTL(TARGET), live)
    near(found, credit(CTL(TARGET), batch), 0)
    assert not found.requires_grad


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
    loss = Reinforce(aggregate="sequence") if scale == "sequence" else Reinforce()
    batch = batch.with_extras(advantages_NT=leave_one_out(returns(c), batch.group_N)[:, None].expand(4, 2))
    return reduced(loss({"logprobs_NT": p(P_SAMPLES)}, batch), batch)


@pytest.mark.parametrize("c", [0.0, 0.2])
def test_returns_and_leave_one_out_advantages_are_the_published_ones(c):
    near(returns(c), RETURNS[c])
    near(leave_one_out(returns(c), torch.zeros(4)), ADVANTAGES[c])
    penalty_NT = -c * (P(P_SAMPLES) - P0(P_SAMPLES))
    batch = rollouts(P_SAMPLES)
    whole = RLOO()(RewardOutput(reward(P_SAMPLES), penalty_NT), batch, {}).advantages_NT
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
    near(Transformed(1.0, -1.0).transform(r), [3.4089666685, -1.3079304303, -13.5949381190, 1.5178086463])
    near(Transformed(0.3, -0.5).transform(r), [3.3873063175, -0.4712666073, -3.4173217352, 1.5722183591])
    near(Transformed(2.0, threshold=-0.5).transform(r), r - torch.tensor([0, 0, 2, 0]))
    assert Transformed().transform(torch.tensor([-1e4])).isfinite().all(), "float32 too"


def test_transformed_credit_leaves_the_penalty_and_the_logged_reward_alone():
    batch, r = rollouts(P_SAMPLES), reward(P_SAMPLES)
    penalty_NT = torch.linspace(-1, 1, 8).view(4, 2)
    rewards = RewardOutput(r, penalty_NT)
    found = Transformed(1.0, -1.0)(rewards, batch, {}).advantages_NT
    near(found[:, 0], leave_one_out(r - (-r).exp() + penalty_NT.sum(1), batch.group_N), 1e-5)
    near(rewards.rewards_N, reward(P_SAMPLES), 0)


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
    p, batch, negative = P.live(), on_q(Q_SAMPLES), Negative(TARGET, alpha=0.1)
    original = loss_of(ORIGINAL, negative, batch, p)
    near(reinforce(0.0, p) + original, -0.5271589850)
    near(reinforce(0.2, p) + original, -0.4767694799)
    near(p.grads(reinforce(0.0, p) + original)[0],
         [-0.0023036435, -0.4693956013, 0.1297127443, 0.0060331464, 0.0033977037, 0.5093567705, -0.1764576337,
          -0.0003434864])  # fmt: skip
    paper = reinforce(0.0, p, "paper") + loss_of(WeightedNLL(), negative, batch, p)
    near(paper, -1.4723480055)
    near(p.grads(paper)[0],
         [-0.0184291480, -0.9589227452, 0.2447513562, 0.0482651710, 0.0271816298, 1.0159037981, -0.3560021706,
          -0.0027478914])  # fmt: skip


def test_without_alpha_nothing_is_negative_and_with_it_the_target_s_samples_lose():
    batch = on_q(Q_SAMPLES)
    assert not credit(Negative(TARGET, alpha=0.0), batch).any()
    p = P.live()
    (first, second), w = p.grads(loss_of(WeightedNLL(), Negative(TARGET, alpha=1.0), batch, p)), weights(-1)[1]
    moved = Table(P.first_V - 0.01 * first, P.second_VV - 0.01 * second)
    assert w @ moved(Q_SAMPLES).sum(1) < w @ P(Q_SAMPLES).sum(1)


def test_the_policy_s_own_samples_weigh_by_reward_alone_and_need_no_forward_pass():
    base = Negative(TARGET, alpha=1.0, weighting="reward")
    assert base.needs == frozenset()
    near(credit(base, rollouts(P_SAMPLES))[:, 0], -(-reward(P_SAMPLES)).softmax(0), 1e-12)


def test_other_weightings():
    batch = on_q(Q_SAMPLES)
    near(credit(Negative(TARGET, alpha=1.0, weighting="uniform"), batch), -0.25, 1e-12)
    reinforced = credit(Negative(TARGET, alpha=0.5, objective="reinforce"), batch)[:, 0]
    w, r = weights(-1)[1], reward(Q_SAMPLES)
    near(reinforced, 0.5 * w * (r - w @ r), 1e-12)


def test_an_indicator_weighs_bad_samples_only_and_none_without_one():
    batch = on_q(Q_SAMPLES)
    threshold = float(reward(Q_SAMPLES).median()) + 1e-6
    bad = reward(Q_SAMPLES) < threshold
    ratio = (P(Q_SAMPLES) - Q(Q_SAMPLES)).sum(1).exp() * bad
    target = Target(potential="indicator", threshold=threshold)
    near(credit(Negative(target, alpha=1.0), batch)[:, 0], -ratio / ratio.sum(), 1e-12)
    assert not credit(Negative(replace(target, threshold=-100.0), alpha=1.0), batch).any()


def test_potentials():
    r = torch.tensor([-3.0, 0.5], dtype=torch.float64)
    near(Target(beta=-2.0).log_potential(r, {}), -2 * r)
    near(Target(beta=-2.0, reward_cap=0.0).log_potential(r, {}), [6.0, 0.0])
    near(Target(beta=2.0, potential="toxicity").log_potential(r, {}), 2 * (1 - r.sigmoid()).log())
    near(Target(beta=-8.0, start_beta=-2.0).log_potential(r, {"progress": 0.5}), -4 * r)
    near(annealed(0.01, 1.0, {"progress": 0.25}), 10**-1.5)
    with pytest.raises(UsageError, match="both positive or both negative"):
        Target(beta=-8.0, start_beta=2.0)
