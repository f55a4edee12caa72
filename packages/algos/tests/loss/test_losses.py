"""Every loss against its formula in plain floats, its gradient against finite differences, and hostile inputs."""

from __future__ import annotations

import math
from math import log
from typing import Any

import pytest
import torch
from loss_table import EVERY, PAIRS, ROWS, TOKENS, completions, example

from rlhf_algos.correction import Correction
from rlhf_algos.loss.bradley_terry import BradleyTerryLoss
from rlhf_algos.loss.cispo import CISPOLoss
from rlhf_algos.loss.clip import ClipLoss
from rlhf_algos.loss.delay import DelayedLoss
from rlhf_algos.loss.dpo import DPOLoss
from rlhf_algos.loss.dppo import DPPOLoss
from rlhf_algos.loss.grpo import GRPOLoss
from rlhf_algos.loss.prm import PRMLoss
from rlhf_algos.loss.reinforce import ReinforceLoss
from rlhf_algos.loss.sapo import SAPOLoss
from rlhf_algos.loss.value import ValueLoss
from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.contract.results import LossTerms, Reduction
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.reduction import count, weighted_sum

every_loss = pytest.mark.parametrize("loss", EVERY, ids=repr)


@pytest.mark.parametrize(("loss", "reduction", "formula"), TOKENS, ids=lambda x: repr(x) if hasattr(x, "needs") else "")
def test_every_token_loss_is_its_formula(loss, reduction, formula):
    outputs, batch = example()
    result = loss(outputs, batch)
    expected = [formula(token) for row in completions(outputs, batch) for token in row.tokens]
    assert result.values[batch.mask_NT].tolist() == pytest.approx(expected, abs=1e-12)
    assert result.reduction == reduction


@pytest.mark.parametrize(("loss", "formula"), PAIRS, ids=lambda x: repr(x) if hasattr(x, "needs") else "")
def test_every_pair_loss_is_its_formula(loss, formula):
    outputs, batch = example()
    result = loss(outputs, batch)
    rows = completions(outputs, batch)
    assert result.values.tolist() == pytest.approx([formula(w, b) for w, b in zip(rows[0::2], rows[1::2])], abs=1e-12)
    assert result.reduction == Reduction("sample")
    assert loss.rows_per_unit == 2


@pytest.mark.parametrize(("loss", "formula"), ROWS, ids=lambda x: repr(x) if hasattr(x, "needs") else "")
def test_every_completion_loss_is_its_formula(loss, formula):
    outputs, batch = example()
    result = loss(outputs, batch)
    assert result.values.tolist() == pytest.approx([formula(row) for row in completions(outputs, batch)], abs=1e-7)
    assert result.reduction == Reduction("sample")


# ----------------------------------------------------------------------------------------------------------------------
# gradients
# ----------------------------------------------------------------------------------------------------------------------


def total(result: LossTerms, batch: Batch) -> torch.Tensor:
    """The loss, reduced as core does it."""
    return weighted_sum(result.values, result.reduction, batch) / count(result.reduction, batch)


def gradients(loss: Any, outputs: dict[str, torch.Tensor], batch: Batch) -> list[torch.Tensor]:
    wanted = [outputs[name] for name in sorted(loss.outputs)]
    return list(torch.autograd.grad(total(loss(outputs, batch), batch), wanted))


@pytest.mark.parametrize("loss", [loss for loss in EVERY if not isinstance(loss, CISPOLoss)], ids=repr)
def test_gradients_agree_with_finite_differences(loss):
    outputs, batch = example(seed=3)

    def function(*wanted: torch.Tensor) -> torch.Tensor:
        values = loss(outputs | dict(zip(sorted(loss.outputs), wanted)), batch).values
        return values[batch.mask_NT] if values.dim() == 2 else values

    assert torch.autograd.gradcheck(function, tuple(outputs[name] for name in sorted(loss.outputs)))


def test_the_weight_of_cispo_carries_no_gradient():
    outputs, batch = example()
    values_NT = CISPOLoss(clip_high=0.1)(outputs, batch).values
    (gradient_NT,) = torch.autograd.grad(values_NT[batch.mask_NT].sum(), outputs["logprobs_NT"])
    tokens = [token for row in completions(outputs, batch) for token in row.tokens]
    expected = [-min(token.ratio, 1.1) * token.advantage for token in tokens]
    assert gradient_NT[batch.mask_NT].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.29, 0.0), (0.3, 1.0), (1.0, 1.0)])
def test_a_delayed_loss_weighs_nothing_until_its_time(progress, share):
    outputs, batch = example()
    batch.step = StepInfo(progress=progress)
    delayed, now = DelayedLoss(ClipLoss(), 0.3)(outputs, batch), ClipLoss()(outputs, batch)
    assert torch.equal(delayed.values, share * now.values)
    assert delayed.reduction == now.reduction
    assert delayed.metrics.keys() == now.metrics.keys()
    assert DelayedLoss(DPOLoss(), 0.3).rows_per_unit == 2
    assert DelayedLoss(ClipLoss(), 0.3).needs == ClipLoss().needs


@every_loss
def test_nothing_outside_the_mask_is_read_or_trained(loss):
    outputs, batch = example()
    before = total(loss(outputs, batch), batch)
    away = lambda x_NT: torch.where(batch.mask_NT, x_NT.detach(), torch.full_like(x_NT, -1e6))
    poisoned = {name: away(x) if x.dim() == 2 else x for name, x in outputs.items()}
    for output in poisoned.values():
        output.requires_grad_()
    batch.extras = {name: away(x) if x.dim() == 2 else x for name, x in batch.extras.items()}
    assert float(total(loss(poisoned, batch), batch).detach()) == pytest.approx(float(before.detach()), rel=1e-6)
    for gradient in gradients(loss, poisoned, batch):
        assert torch.isfinite(gradient).all()
        if gradient.dim() == 2:
            assert not gradient[~batch.mask_NT].any()


@every_loss
@pytest.mark.parametrize("distance", [-1e4, -90.0, 90.0, 1e4])
def test_policies_far_apart_leave_loss_and_gradient_finite(loss, distance):
    outputs, batch = example()
    with torch.no_grad():
        outputs["logprobs_NT"] += distance
        outputs["scores_N"][0::2] += distance
    outputs = {name: x.detach().float().requires_grad_() for name, x in outputs.items()}
    batch.extras = {name: x.float() for name, x in batch.extras.items()}
    result = loss(outputs, batch)
    assert torch.isfinite(total(result, batch))
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, outputs, batch))
    assert all(math.isfinite(float(metric.total)) for metric in result.metrics.values())


@pytest.mark.parametrize("loss", [loss for loss in EVERY if "advantages_NT" in loss.needs], ids=repr)
def test_no_advantage_no_gradient(loss):
    outputs, batch = example()
    batch.extras["advantages_NT"] = torch.zeros_like(batch["advantages_NT"])
    for gradient in gradients(loss, outputs, batch):
        assert not gradient.any()


@pytest.mark.parametrize("loss", [ClipLoss(), GRPOLoss(aggregate="token"), ClipLoss(dual_clip=3.0)], ids=repr)
def test_on_policy_every_clipped_objective_is_the_policy_gradient(loss):
    """Ratio 1: the gradient is that of -mean A log pi (RePULSe's check Q4)."""
    outputs, batch = example()
    batch.extras["old_logprobs_NT"] = outputs["logprobs_NT"].detach()
    plain = gradients(ReinforceLoss(aggregate="token"), outputs, batch)
    for got, expected in zip(gradients(loss, outputs, batch), plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_clip_stops_only_what_moves_further_away():
    """log-ratios 0, 0.3, -0.5 with advantages 1, 1, -1 (RePULSe's check Q2): the last two are cut off."""
    batch = make_batch([3]).with_extras(
        old_logprobs_NT=torch.zeros(1, 3), advantages_NT=torch.tensor([[1.0, 1.0, -1.0]])
    )
    logprobs_NT = torch.tensor([[0.0, 0.3, -0.5]], requires_grad=True)
    result = ClipLoss()({"logprobs_NT": logprobs_NT}, batch)
    assert result.values[0].tolist() == pytest.approx([-1.0, -1.2, 0.8])
    (gradient,) = torch.autograd.grad(result.values.sum(), logprobs_NT)
    assert gradient[0].tolist() == [-1.0, 0.0, 0.0]
    metric = result.metrics["clip_fraction"]
    assert float(metric.total / metric.count) == pytest.approx(2 / 3)


def test_sapo_fades_where_grpo_cuts_off():
    """On policy both have the gradient -A; far from it SAPO's is smaller, never 0, and smaller still under a larger tau."""
    ratios = torch.tensor([[1.0, 1.5, 3.0]], dtype=torch.float64)
    batch = make_batch([3]).with_extras(
        old_logprobs_NT=torch.zeros(1, 3).double(), advantages_NT=torch.ones(1, 3).double()
    )

    def weights(tau):
        logprobs_NT = ratios.log().requires_grad_()
        result = SAPOLoss(tau_pos=tau)({"logprobs_NT": logprobs_NT}, batch)
        (gradient,) = torch.autograd.grad(result.values.sum(), logprobs_NT)
        weights_T = (-gradient / ratios)[0]
        gate = result.metrics["gate"]
        assert float(gate.total / gate.count) == pytest.approx(float(weights_T.mean()))
        return weights_T.tolist()

    soft, hard = weights(1.0), weights(3.0)
    assert soft[0] == hard[0] == pytest.approx(1.0)
    assert 1 > soft[1] > soft[2] > 0
    assert hard[1] < soft[1] and hard[2] < soft[2]


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_drops_frequent_tokens_that_leave_and_keeps_rare_ones_and_those_that_return(divergence):
    """mu and pi of four tokens: a frequent one up, a rare one with a larger ratio, a frequent one coming back, one staying."""
    mu_NT, pi_NT = torch.tensor([[0.5, 0.001, 0.5, 0.5]]), torch.tensor([[0.9, 0.01, 0.9, 0.51]])
    batch = make_batch([4]).with_extras(
        sampler_logprobs_NT=mu_NT.log(), advantages_NT=torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    )
    logprobs_NT = pi_NT.log().requires_grad_()
    delta = {"tv": 0.15, "kl": 0.45}[divergence]  # KL(mu || pi) of 0.5 and 0.9 is 0.51, the other way it is 0.37
    result = DPPOLoss(divergence=divergence, delta=delta)({"logprobs_NT": logprobs_NT}, batch)
    (gradient,) = torch.autograd.grad(result.values.sum(), logprobs_NT)
    assert gradient[0].tolist() == pytest.approx([0.0, -10.0, 1.8, -1.02])
    metric = result.metrics["clip_fraction"]
    assert float(metric.total / metric.count) == 0.25


def test_dppo_is_not_corrected_for_the_sampler_twice():
    with pytest.raises(UsageError, match="nothing to correct"):
        DPPOLoss(correction=Correction("token", "clip"))


def test_the_value_loss_gives_the_numbers_of_repulse():
    batch = make_batch([3]).with_extras(
        values_NT=torch.tensor([[0.5, -0.2, 0.1]]), returns_NT=torch.tensor([[0.6, 0.4, -0.3]])
    )
    result = ValueLoss()({"values_NT": torch.tensor([[0.9, -0.1, 0.1]])}, batch)
    assert (2 * result.values[0]).tolist() == pytest.approx([0.09, 0.25, 0.16])
    assert float(total(result, batch)) == pytest.approx(0.0833333333)


# ----------------------------------------------------------------------------------------------------------------------
# mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [row[0] for row in PAIRS], ids=repr)
def test_rows_that_are_no_pairs_are_refused(loss):
    outputs, batch = example()
    batch.group_N = torch.tensor([0, 1, 2, 3, 4, 5])
    with pytest.raises(UsageError, match="without a rejected completion"):
        loss(outputs, batch)


def test_labels_that_do_not_fit_the_steps_are_refused():
    outputs, batch = example()
    for labels, message in ((["+"] * 3, "has 2 steps"), (["good", "+"], "must be '\\+', '-' or a probability")):
        batch.labels[0] = labels
        with pytest.raises(UsageError, match=message):
            PRMLoss(placeholder=7)(outputs, batch)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Correction("geometric", "clip"),
        lambda: Correction("token", "clip", gate="tv"),
        lambda: Correction("token", low=2.0, high=1.0),
    ],
)
def test_options_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="correction"):
        make()


# ----------------------------------------------------------------------------------------------------------------------
# metrics
# ----------------------------------------------------------------------------------------------------------------------


def test_metrics_have_their_own_denominators():
    outputs, batch = example()
    rows = completions(outputs, batch)
    tokens = [token for row in rows for token in row.tokens]
    mean = lambda metric: float(metric.total / metric.count)

    metrics = ClipLoss()(outputs, batch).metrics
    assert mean(metrics["ratio"]) == pytest.approx(sum(x.ratio for x in tokens) / len(tokens), rel=1e-6)
    outside = [x for x in tokens if (x.ratio > 1.2 and x.advantage > 0) or (x.ratio < 0.8 and x.advantage < 0)]
    assert mean(metrics["clip_fraction"]) == pytest.approx(len(outside) / len(tokens))
    k3 = [x.ratio - 1 - log(x.ratio) for x in tokens]
    assert mean(metrics["approx_kl"]) == pytest.approx(sum(k3) / len(tokens), rel=1e-6)

    metrics = DPOLoss(beta=0.5)(outputs, batch).metrics
    margins = [0.5 * (w.h - b.h) for w, b in zip(rows[0::2], rows[1::2])]
    assert mean(metrics["accuracy"]) == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert mean(metrics["margin"]) == pytest.approx(sum(margins) / 3, rel=1e-6)
    assert mean(BradleyTerryLoss()(outputs, batch).metrics["chosen_reward"]) == pytest.approx(
        sum(row.score for row in rows[0::2]) / 3, rel=1e-6
    )
