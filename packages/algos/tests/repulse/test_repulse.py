"""RePULSe against closed forms: importance weights and CTL, on the published fixture (`repulse_fixture`)."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

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

from rlhf_algos import collapse
from rlhf_algos.advantage.ctl import CTLAdvantage
from rlhf_algos.advantage.sixo_negatives import SixoNegativesAdvantage
from rlhf_algos.importance import group_log_softmax, log_weights, twist_log_weights, weight_metrics
from rlhf_algos.loss.weighted_nll import WeightedNLLLoss
from rlhf_core.option_text import OptionNames

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


def test_weights_average_to_the_normalizer_under_any_proposal():
    target, log_z = sigma(-1)
    every = log_weights(P(ALL), Q(ALL), TARGET.log_potential(reward(ALL), 0.0), torch.ones(64, 2).bool())
    q = Q(ALL).sum(1).exp()
    near(q @ every.exp(), log_z.exp(), 1e-12)
    near(q @ every, log_z - q @ (q.log() - target.log()), 1e-12)
    near(q @ every, -1.2742668180)
    near(target @ every, log_z + target @ (target.log() - q.log()), 1e-12)
    near(target @ every, 2.0995247631)


def test_self_normalized_weights_are_the_published_ones():
    log_w, w = weights(-1)
    near(log_w, [-1.1750689482, 1.3553751218, -1.3043295879, 0.7676256458])
    near(w, [0.0466954687, 0.5864522206, 0.0410334049, 0.3258189058])
    metrics = weight_metrics(log_w, torch.zeros(4), None, "repulse")
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


def test_self_normalization_has_the_bias_that_enumeration_says():
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
    metrics = weight_metrics(every[drawn], torch.zeros(400_000), None, "x")
    near(metrics["x/log_z"], log_z, 0.03)
    near(metrics["x/kl_proposal_target"], 1.8257929972, 0.03)
    near(metrics["x/kl_target_proposal"], 1.5479985838, 0.03)
    near(metrics["x/ess"] / 400_000, 1 / (target.square() / q).sum(), 0.01)


def test_prompts_whose_weight_rests_on_one_sample_are_counted():
    metrics = weight_metrics(torch.tensor([0.0, 50.0, 1.0, 1.0, 9.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2]), None, "x")
    near(metrics["x/collapsed"], 2 / 3)
    near(metrics["x/largest_weight"], (1 + 1 / 2 + math.exp(9) / (1 + math.exp(9))) / 3)


def test_a_collapse_is_said_once_in_a_while(capsys):
    config = SimpleNamespace(sampling=SimpleNamespace(n=64), option_names=OptionNames())
    run: Any = SimpleNamespace(config=config)
    watching = collapse.CollapseWarning()
    for step in range(1, 302):
        watching.rlhf_step_end(run, step, {"repulse/ess": 1.2 if step > 50 else 4.2})
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == ["step 51", "step 151", "step 251"]
    assert "(repulse/ess 1.20 of 64 samples)" in said[0]
    watching = collapse.CollapseWarning()  # of another run
    watching.rlhf_step_end(run, 302, {"repulse/ess": 4.1})
    assert "step 302" in capsys.readouterr().err
    watching.rlhf_step_end(run, 900, {"reward/mean": 1.0})
    assert not capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# CTL
# ----------------------------------------------------------------------------------------------------------------------


def exact_kl_gradient(model: Table, prefix: int = 2) -> tuple[Tensor, Tensor]:
    """grad KL(sigma(s_1:prefix) || q(s_1:prefix)) by autograd through the sum over all outputs."""
    target, _ = sigma(-1)
    return model.grads(-(target @ model(ALL)[:, :prefix].sum(1)))


def test_the_positive_term_of_ctl_is_the_gradient_of_the_divergence_and_the_negative_one_vanishes():
    """By enumeration, for both parameterizations of the twist."""
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
    loss = loss_of(ORIGINAL, CTLAdvantage(TARGET), batch, q, minus=P(Q_SAMPLES))
    near(loss, 0.0593124302)
    first, second = q.grads(loss)
    near(first, [0.0254130664, 0, 0, -0.0420565276, -0.0094773632, 0, 0, 0.0261208244])
    near(math.hypot(first.norm(), second.norm()), 0.0621304053)
    paper = q.grads(loss_of(WeightedNLLLoss(), CTLAdvantage(TARGET), batch, q))
    near(paper[0], 8 * first), near(paper[1], 8 * second)  # N = 4 samples of T = 2 tokens


def test_ctl_without_its_second_term_is_the_published_loss_and_dpg_in_gradient():
    q, batch, p = Q.live(), on_q(Q_SAMPLES), P(Q_SAMPLES)
    loss = loss_of(ORIGINAL, CTLAdvantage(TARGET, contrast="none"), batch, q, minus=p)
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
    loss = loss_of(ORIGINAL, CTLAdvantage(TARGET, psi="q_p_s_1_to_t"), batch, q, minus=p)
    near(loss, 0.0618991754)
    _, w = weights(-1)
    written_out = -((w[:, None] - 0.25) * (q(Q_SAMPLES) - p).cumsum(1)).mean(1).mean()
    near(loss, written_out.detach(), 1e-12)
    for found, expected in zip(q.grads(loss), q.grads(written_out)):
        near(found, expected, 1e-12)


def logits(model: Table, outputs: Tensor) -> Tensor:
    """The raw logits of sampled tokens."""
    a, b = outputs.unbind(1)
    return torch.stack([model.first_V[a], model.second_VV[a, b]], 1)


def test_an_unnormalized_twist_has_the_published_loss_and_a_negative_term_that_does_not_vanish():
    p, q = P(Q_SAMPLES), Q.live()
    batch = on_q(Q_SAMPLES).with_extras(**{"<trained>.logits_NT": logits(Q, Q_SAMPLES)})
    ctl = CTLAdvantage(TARGET, psi="unnormalized")
    assert ctl.needs == {"actor.logprobs_NT", "old_logprobs_NT", "<trained>.logits_NT"}
    loss = replace(ORIGINAL, output="logits_NT")
    assert loss.outputs == {"logits_NT"}
    batch = batch.with_extras(advantages_NT=credit(ctl, batch))
    value = reduced(loss({"logits_NT": logits(q, Q_SAMPLES) - p}, batch), batch)
    near(value, 0.0587506937)
    w = weights(-1)[1][:, None]
    prefix = torch.stack([torch.zeros(4), (p - Q(Q_SAMPLES))[:, 0]], 1).double()
    z = torch.stack([Q.first_V.logsumexp(0).expand(4), Q.second_VV.logsumexp(1)[Q_SAMPLES[:, 0]]], 1)
    negative = (prefix + z).softmax(0)  # p(s_<t) / q(s_<t) times the sum of exp z_t
    written_out = -((w - negative) * logits(q, Q_SAMPLES)).mean(1).mean()
    for found, expected in zip(q.grads(value), q.grads(written_out)):
        near(found, expected, 1e-12)


def test_dpg_of_an_unnormalized_twist_is_weighted_likelihood_too():
    """Its second part turns grad z into grad log q: the option is `contrast none` with a normalized twist."""
    q, w = Q.live(), weights(-1)[1][:, None]
    rows = torch.stack([q.first_V.expand(4, 8), q.second_VV[Q_SAMPLES[:, 0]]], 1)  # z_t(v)
    dpg = -(w * (logits(q, Q_SAMPLES) - (rows.softmax(2).detach() * rows).sum(2))).mean(1).mean()
    mine = loss_of(ORIGINAL, CTLAdvantage(TARGET, contrast="none"), on_q(Q_SAMPLES), q)
    for found, expected in zip(q.grads(mine), q.grads(dpg)):
        near(found, expected, 1e-12)


@pytest.mark.parametrize("psi", ["q_p_s_t", "q_p_s_1_to_t", "unnormalized"])
def test_sixo_with_exact_negatives_has_the_gradient_of_its_loss(psi):
    q, w = Q.live(), weights(-1)[1][:, None]
    read = {"q_p_s_t": lambda s: q(s), "q_p_s_1_to_t": lambda s: q(s).cumsum(1), "unnormalized": lambda s: logits(q, s)}
    log_p = {"q_p_s_1_to_t": lambda s: P(s).cumsum(1)}.get(psi, P)
    psi_q, psi_p = (read[psi](s) - log_p(s) for s in (Q_SAMPLES, P_SAMPLES))
    sixo = -(w * psi_q.sigmoid().log()).mean(1).mean() - (0.25 * (-psi_p).sigmoid().log()).mean(1).mean()
    output = "logits_NT" if psi == "unnormalized" else "logprobs_NT"
    model = (lambda s: logits(q, s)) if psi == "unnormalized" else q
    own = rollouts(P_SAMPLES, {"old_logprobs_NT": P(P_SAMPLES), "<trained>.logprobs_NT": Q(P_SAMPLES)})
    own = own.with_extras(**{"<trained>.logits_NT": logits(Q, P_SAMPLES)})
    batch = on_q(Q_SAMPLES).with_extras(**{"<trained>.logits_NT": logits(Q, Q_SAMPLES)})
    total = torch.zeros(())
    for advantage, each in ((CTLAdvantage(TARGET, psi, "sixo_exact"), batch), (SixoNegativesAdvantage(psi), own)):
        credited = each.with_extras(advantages_NT=credit(advantage, each))
        values = replace(ORIGINAL, output=output)({output: model(each.tokens_NT)}, credited)
        total = total + reduced(values, credited)
    for found, expected in zip(q.grads(total), q.grads(sixo)):
        near(found, expected, 1e-12)


def test_sixo_with_reweighted_negatives_has_the_gradient_of_the_published_loss():
    q, batch, p = Q.live(), on_q(Q_SAMPLES), P(Q_SAMPLES)
    _, w = weights(-1)
    u_ = (p - Q(Q_SAMPLES)).sum(1).softmax(0)
    log_psi = q(Q_SAMPLES) - p
    sixo = -(w[:, None] * log_psi.sigmoid().log() + u_[:, None] * (-log_psi).sigmoid().log()).mean(1).mean()
    near(sixo, 0.3763136214)
    for found, expected in zip(
        q.grads(loss_of(ORIGINAL, CTLAdvantage(TARGET, contrast="sixo"), batch, q)), q.grads(sixo)
    ):
        near(found, expected, 1e-12)


@pytest.mark.parametrize("contrast", ["prefix", "none"])
def test_the_sampled_gradient_converges_to_that_of_the_divergence(contrast):
    q = Q.live()
    drawn = torch.multinomial(
        Q(ALL).sum(1).exp(), 400_000, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    samples = ALL[drawn]
    batch = on_q(samples)
    found = q.grads(loss_of(WeightedNLLLoss(), CTLAdvantage(TARGET, contrast=contrast), batch, q))
    for mine, exact in zip(found, exact_kl_gradient(q)):
        near(mine, exact, 0.02)


def test_identical_samples_teach_ctl_nothing_and_weighted_likelihood_something():
    q, batch = Q.live(), on_q(Q_SAMPLES[[1, 1, 1, 1]])
    assert credit(CTLAdvantage(TARGET), batch).abs().max() < 1e-15
    assert q.grads(loss_of(ORIGINAL, CTLAdvantage(TARGET, contrast="none"), batch, q))[0].norm() > 0.01


def test_a_proposal_that_is_the_target_has_equal_weights():
    target = sigma(-1)[0].view(8, 8)
    found = Table(target.sum(1).log(), (target / target.sum(1, keepdim=True)).log())
    near(weights(-1, P, found)[1], 0.25, 1e-12)
    batch = on_q(Q_SAMPLES, q=found)
    q = found.live()
    for grad in q.grads(loss_of(ORIGINAL, CTLAdvantage(TARGET, psi="q_p_s_1_to_t"), batch, q)):
        near(grad, 0.0, 1e-12)
    first, second = q.grads(loss_of(ORIGINAL, CTLAdvantage(TARGET), batch, q))
    near(first, 0.0, 1e-12)
    near(second.abs().max(), 0.0303526737)


def test_only_the_proposal_s_log_probabilities_are_differentiated():
    batch = on_q(Q_SAMPLES)
    live = batch.with_extras(**{name: tensor.clone().requires_grad_() for name, tensor in batch.extras.items()})
    with torch.no_grad():
        found = credit(CTLAdvantage(TARGET), live)
    near(found, credit(CTLAdvantage(TARGET), batch), 0)
    assert not found.requires_grad
