"""Every loss against its formula in plain floats, its gradient against finite differences, and hostile inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from statistics import fmean
from typing import Any

import pytest
import torch

from rlhf_algos.correction import Correction
from rlhf_algos.loss.bradley_terry import BradleyTerry
from rlhf_algos.loss.cdpo import CDPO
from rlhf_algos.loss.chosen_nll import ChosenNLL
from rlhf_algos.loss.cispo import CISPO
from rlhf_algos.loss.clip import Clip
from rlhf_algos.loss.dapo import DAPO
from rlhf_algos.loss.delayed import Delayed
from rlhf_algos.loss.dpo import DPO
from rlhf_algos.loss.dr_grpo import DrGRPO
from rlhf_algos.loss.entropy import Entropy
from rlhf_algos.loss.grpo import GRPO
from rlhf_algos.loss.gspo import GSPO
from rlhf_algos.loss.hinge import Hinge
from rlhf_algos.loss.ipo import IPO
from rlhf_algos.loss.kto import KTO
from rlhf_algos.loss.orpo import ORPO
from rlhf_algos.loss.prm import PRM
from rlhf_algos.loss.reinforce import Reinforce
from rlhf_algos.loss.robust import Robust
from rlhf_algos.loss.sft import SFT
from rlhf_algos.loss.simpo import SimPO
from rlhf_algos.loss.value import Value
from rlhf_core.errors import UsageError
from rlhf_core.reduce import count, weighted_sum
from rlhf_core.testing.batches import make_batch
from rlhf_core.types import Batch, LossTerms, Reduction

# ----------------------------------------------------------------------------------------------------------------------
# what losses are given: ragged lengths, a single token, a gap of environment tokens, three pairs
# ----------------------------------------------------------------------------------------------------------------------

OUTPUTS = ("logprobs_NT", "entropy_NT", "values_NT")
EXTRAS = ("old_logprobs_NT", "ref_logprobs_NT", "sampler_logprobs_NT", "advantages_NT", "returns_NT", "values_NT")


def example(seed: int = 0) -> tuple[dict[str, torch.Tensor], Batch]:
    """Float64 outputs that carry a gradient, and a batch; everything is noise, also where the mask is false."""
    noise = torch.Generator().manual_seed(seed)
    batch = make_batch([5, 1, 3, 6, 2, 4], groups=[0, 0, 1, 1, 2, 2])
    batch.mask_NT[3, 2:4] = False
    normal = lambda *shape: torch.randn(*shape, generator=noise, dtype=torch.float64)
    shape = batch.mask_NT.shape
    outputs = {name: 0.5 * normal(*shape) for name in OUTPUTS} | {"scores_N": normal(6)}
    outputs["logprobs_NT"] = outputs["logprobs_NT"] - 2
    extras = {name: 0.5 * normal(*shape) - 2 * name.endswith("logprobs_NT") for name in EXTRAS}
    batch.tokens_NT[:, :2] = 7  # what ends a step for PRM
    batch.tokens_NT[1, 1:] = 0
    batch.labels = [["-", 0.7] if length > 1 else ["-"] for length in batch.lengths_N.tolist()]
    margin_N = normal(6).abs()
    margin_N[1::2] = margin_N[0::2]  # a number of the row, so of both of its completions
    for output in outputs.values():
        output.requires_grad_()
    return outputs, batch.with_extras(**extras, margin_N=margin_N)


@dataclass
class Token:
    """One sampled token."""

    lp: float
    old: float
    ref: float
    sampler: float
    advantage: float
    target: float
    value: float
    old_value: float
    entropy: float
    row: Completion | None = None
    """the completion it is in"""

    @property
    def ratio(self) -> float:
        return exp(self.lp - self.old)

    @property
    def rho(self) -> float:
        """trainer over sampler"""
        return exp(self.old - self.sampler)


@dataclass
class Completion:
    """One completion: its sampled tokens, what the data says of it, and its score."""

    tokens: list[Token]
    score: float
    margin: float

    @property
    def lp(self) -> float:
        return sum(token.lp for token in self.tokens)

    @property
    def h(self) -> float:
        """log pi / ref"""
        return sum(token.lp - token.ref for token in self.tokens)

    @property
    def mean_lp(self) -> float:
        return self.lp / len(self.tokens)

    @property
    def mean_ratio(self) -> float:
        """geometric mean of pi / pi_old"""
        return exp(sum(token.lp - token.old for token in self.tokens) / len(self.tokens))

    @property
    def rho(self) -> float:
        """trainer over sampler, of the whole completion"""
        return exp(sum(token.old - token.sampler for token in self.tokens))


def completions(outputs: dict[str, torch.Tensor], batch: Batch) -> list[Completion]:
    names = [outputs["logprobs_NT"], *(batch[name] for name in EXTRAS[:5]), outputs["values_NT"], batch["values_NT"]]
    names.append(outputs["entropy_NT"])
    rows = [
        Completion(
            [Token(*(float(column[i, t].detach()) for column in names)) for t in batch.mask_NT[i].nonzero().flatten()],
            float(outputs["scores_N"][i].detach()),
            float(batch["margin_N"][i]),
        )
        for i in range(len(batch))
    ]
    for row in rows:
        for token in row.tokens:
            token.row = row
    return rows


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(x, high))


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


# ----------------------------------------------------------------------------------------------------------------------
# the table: a loss, its reduction, and its formula for one token, or for one pair
# ----------------------------------------------------------------------------------------------------------------------


def ppo(low: float, high: float, dual: float = 0.0) -> Callable[[Token], float]:
    def formula(x: Token) -> float:
        objective = min(x.ratio * x.advantage, clip(x.ratio, 1 - low, 1 + high) * x.advantage)
        return -max(objective, dual * x.advantage) if dual and x.advantage < 0 else -objective

    return formula


def gspo(low: float, high: float) -> Callable[[Token], float]:
    def formula(x: Token) -> float:
        s = x.row.mean_ratio
        return -min(s * x.advantage, clip(s, 1 - low, 1 + high) * x.advantage)

    return formula


def within(ratio: float, low: float, high: float) -> float:
    """1 inside the band, else 0."""
    return float(low <= ratio <= high)


def coins(log_p: float, log_q: float) -> float:
    """KL of two coins."""
    p, q = exp(log_p), exp(log_q)
    return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))


def kto(x: Completion, beta: float) -> float:
    """The weight is the mean advantage and the reference point the mean return of the completion's tokens."""
    weight, z = fmean(token.advantage for token in x.tokens), fmean(token.target for token in x.tokens)
    value = 1 / (1 + exp(-beta * (x.h - z))) if weight > 0 else 1 / (1 + exp(-beta * (z - x.h)))
    return abs(weight) * (1 - value)


def judged_steps(x: Completion) -> list[float]:
    """Cross-entropies of the completion's steps: its first two tokens end one each, judged wrong and 70 % right."""
    return [
        -(p * log_sigmoid(token.value) + (1 - p) * log_sigmoid(-token.value))
        for token, p in zip(x.tokens, (0.0, 0.7), strict=False)
    ]


def log_odds(log_p: float) -> float:
    return log(exp(log_p) / (1 - exp(log_p)))


def clipped_value(x: Token, width: float) -> float:
    near = x.old_value + clip(x.value - x.old_value, -width, width)
    return max((x.value - x.target) ** 2, (near - x.target) ** 2) / 2


CORRECTIONS: list[tuple[Correction, Callable[[Token], float]]] = [
    (Correction("token", "clip", high=1.3), lambda x: min(x.rho, 1.3)),
    (Correction("token", "mask", 0.5, 1.5), lambda x: x.rho * within(x.rho, 0.5, 1.5)),
    (Correction("sequence", "clip", high=1.1), lambda x: min(x.row.rho, 1.1)),
    (Correction("sequence", "mask", high=1.2), lambda x: x.row.rho * within(x.row.rho, 0, 1.2)),
    (
        Correction("geometric", "mask", 0.9, 1.2),
        lambda x: x.rho * within(x.row.rho ** (1 / len(x.row.tokens)), 0.9, 1.2),
    ),
    (
        Correction("token", "mask", high=0.05, gate="tv"),
        lambda x: x.rho * within(abs(exp(x.sampler) - exp(x.old)), 0, 0.05),
    ),
    (
        Correction("sequence", "mask", high=0.02, gate="binary_kl"),
        lambda x: x.rho * within(fmean(coins(y.sampler, y.old) for y in x.row.tokens), 0, 0.02),
    ),
]
"""Off-policy corrections and their weights, shown on the objective whose loss is simplest."""


def corrected(weight: Callable[[Token], float]) -> Callable[[Token], float]:
    return lambda x: -weight(x) * x.advantage * x.lp


TOKENS: list[tuple[Any, Reduction, Callable[[Token], float]]] = [
    (Clip(), Reduction("token"), ppo(0.2, 0.2)),
    (Clip(clip_low=0.1, clip_high=0.28), Reduction("token"), ppo(0.1, 0.28)),
    (Clip(dual_clip=1.5), Reduction("token"), ppo(0.2, 0.2, 1.5)),
    (Clip(aggregate="constant", length=7), Reduction("constant", 7), ppo(0.2, 0.2)),
    (GRPO(), Reduction("sequence"), ppo(0.2, 0.2)),
    (Reinforce(), Reduction("constant", 1), lambda x: -x.advantage * x.lp),
    (DrGRPO(length=9), Reduction("constant", 9), ppo(0.2, 0.2)),
    (DAPO(), Reduction("token"), ppo(0.2, 0.28)),
    (GSPO(), Reduction("sequence"), gspo(3e-4, 4e-4)),
    (GSPO(clip_low=0.2, clip_high=0.3), Reduction("sequence"), gspo(0.2, 0.3)),
    (CISPO(), Reduction("token"), lambda x: -min(x.ratio, 5.0) * x.advantage * x.lp),
    (CISPO(clip_low=0.1, clip_high=0.2), Reduction("token"), lambda x: -clip(x.ratio, 0.9, 1.2) * x.advantage * x.lp),
    (
        Clip(correction=Correction("token", "clip", high=1.3)),
        Reduction("token"),
        lambda x: min(x.rho, 1.3) * ppo(0.2, 0.2)(x),
    ),
    (Value(clip=0), Reduction("token"), lambda x: (x.value - x.target) ** 2 / 2),
    (Value(), Reduction("token"), lambda x: clipped_value(x, 0.2)),
    (Value(clip=0.5, aggregate="sequence"), Reduction("sequence"), lambda x: clipped_value(x, 0.5)),
    (SFT(), Reduction("token"), lambda x: -x.lp),
    (SFT(aggregate="sequence"), Reduction("sequence"), lambda x: -x.lp),
    (Entropy(), Reduction("token"), lambda x: -x.entropy),
    *((Reinforce(correction=each), Reduction("constant", 1), corrected(weight)) for each, weight in CORRECTIONS),
]

PAIRS: list[tuple[Any, Callable[[Completion, Completion], float]]] = [
    (DPO(), lambda w, b: -log_sigmoid(0.1 * (w.h - b.h))),
    (DPO(beta=0.7), lambda w, b: -log_sigmoid(0.7 * (w.h - b.h))),
    (
        CDPO(beta=0.3, label_smoothing=0.2),
        lambda w, b: -0.8 * log_sigmoid(x := 0.3 * (w.h - b.h)) - 0.2 * log_sigmoid(-x),
    ),
    (
        Robust(beta=0.3, label_smoothing=0.2),
        lambda w, b: (-0.8 * log_sigmoid(x := 0.3 * (w.h - b.h)) + 0.2 * log_sigmoid(-x)) / 0.6,
    ),
    (Hinge(beta=0.9), lambda w, b: max(0.0, 1 - 0.9 * (w.h - b.h))),
    (IPO(beta=0.2), lambda w, b: (w.h - b.h - 2.5) ** 2),
    (IPO(beta=0.2, per="token"), lambda w, b: (w.h / len(w.tokens) - b.h / len(b.tokens) - 2.5) ** 2),
    (SimPO(), lambda w, b: -log_sigmoid(2 * (w.mean_lp - b.mean_lp) - 1)),
    (SimPO(beta=2.5, gamma=0.3), lambda w, b: -log_sigmoid(2.5 * (w.mean_lp - b.mean_lp) - 0.3)),
    (ORPO(lam=0.4), lambda w, b: -w.mean_lp - 0.4 * log_sigmoid(log_odds(w.mean_lp) - log_odds(b.mean_lp))),
    (ChosenNLL(), lambda w, b: -w.mean_lp),
    (BradleyTerry(), lambda w, b: log(1 + exp(b.score - w.score))),
    (BradleyTerry(margin=True), lambda w, b: -log_sigmoid(w.score - b.score - w.margin)),
    (BradleyTerry(centre=0.3), lambda w, b: -log_sigmoid(w.score - b.score) + 0.3 * (w.score + b.score) ** 2),
]

ROWS: list[tuple[Any, Callable[[Completion], float]]] = [
    (KTO(), lambda x: kto(x, 0.1)),
    (KTO(beta=0.6), lambda x: kto(x, 0.6)),
    (PRM(placeholder=7), lambda x: sum(steps := judged_steps(x)) / max(1, len(steps))),
]

EVERY = [row[0] for row in (*TOKENS, *PAIRS, *ROWS)]
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
    wanted = [outputs[name] for name in sorted(loss.wants)]
    return list(torch.autograd.grad(total(loss(outputs, batch), batch), wanted))


@pytest.mark.parametrize("loss", [loss for loss in EVERY if not isinstance(loss, CISPO)], ids=repr)
def test_gradients_agree_with_finite_differences(loss):
    outputs, batch = example(seed=3)

    def function(*wanted: torch.Tensor) -> torch.Tensor:
        values = loss(outputs | dict(zip(sorted(loss.wants), wanted)), batch).values
        return values[batch.mask_NT] if values.dim() == 2 else values

    assert torch.autograd.gradcheck(function, tuple(outputs[name] for name in sorted(loss.wants)))


def test_the_weight_of_cispo_carries_no_gradient():
    outputs, batch = example()
    values_NT = CISPO(clip_high=0.1)(outputs, batch).values
    (gradient_NT,) = torch.autograd.grad(values_NT[batch.mask_NT].sum(), outputs["logprobs_NT"])
    tokens = [token for row in completions(outputs, batch) for token in row.tokens]
    expected = [-min(token.ratio, 1.1) * token.advantage for token in tokens]
    assert gradient_NT[batch.mask_NT].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.29, 0.0), (0.3, 1.0), (1.0, 1.0)])
def test_a_delayed_loss_weighs_nothing_until_its_time(progress, share):
    outputs, batch = example()
    batch.scalars["progress"] = progress
    delayed, now = Delayed(Clip(), 0.3)(outputs, batch), Clip()(outputs, batch)
    assert torch.equal(delayed.values, share * now.values)
    assert delayed.reduction == now.reduction
    assert delayed.metrics.keys() == now.metrics.keys()
    assert Delayed(DPO(), 0.3).rows_per_unit == 2
    assert Delayed(Clip(), 0.3).needs == Clip().needs


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


@pytest.mark.parametrize("loss", [Clip(), GRPO(aggregate="token"), Clip(dual_clip=3.0)], ids=repr)
def test_on_policy_every_clipped_objective_is_the_policy_gradient(loss):
    """Ratio 1: the gradient is that of -mean A log pi (RePULSe's check Q4)."""
    outputs, batch = example()
    batch.extras["old_logprobs_NT"] = outputs["logprobs_NT"].detach()
    plain = gradients(Reinforce(aggregate="token"), outputs, batch)
    for got, expected in zip(gradients(loss, outputs, batch), plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_clip_stops_only_what_moves_further_away():
    """log-ratios 0, 0.3, -0.5 with advantages 1, 1, -1 (RePULSe's check Q2): the last two are cut off."""
    batch = make_batch([3]).with_extras(
        old_logprobs_NT=torch.zeros(1, 3), advantages_NT=torch.tensor([[1.0, 1.0, -1.0]])
    )
    logprobs_NT = torch.tensor([[0.0, 0.3, -0.5]], requires_grad=True)
    result = Clip()({"logprobs_NT": logprobs_NT}, batch)
    assert result.values[0].tolist() == pytest.approx([-1.0, -1.2, 0.8])
    (gradient,) = torch.autograd.grad(result.values.sum(), logprobs_NT)
    assert gradient[0].tolist() == [-1.0, 0.0, 0.0]
    metric = result.metrics["clip_fraction"]
    assert float(metric.total / metric.count) == pytest.approx(2 / 3)


def test_the_value_loss_gives_the_numbers_of_repulse():
    batch = make_batch([3]).with_extras(
        values_NT=torch.tensor([[0.5, -0.2, 0.1]]), returns_NT=torch.tensor([[0.6, 0.4, -0.3]])
    )
    result = Value()({"values_NT": torch.tensor([[0.9, -0.1, 0.1]])}, batch)
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
    for labels, message in ((["+"] * 3, "has 2 steps"), (["good", "+"], "is '\\+', '-' or a probability")):
        batch.labels[0] = labels
        with pytest.raises(UsageError, match=message):
            PRM(placeholder=7)(outputs, batch)


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

    metrics = Clip()(outputs, batch).metrics
    assert mean(metrics["ratio"]) == pytest.approx(sum(x.ratio for x in tokens) / len(tokens), rel=1e-6)
    outside = [x for x in tokens if (x.ratio > 1.2 and x.advantage > 0) or (x.ratio < 0.8 and x.advantage < 0)]
    assert mean(metrics["clip_fraction"]) == pytest.approx(len(outside) / len(tokens))
    k3 = [x.ratio - 1 - log(x.ratio) for x in tokens]
    assert mean(metrics["approx_kl"]) == pytest.approx(sum(k3) / len(tokens), rel=1e-6)

    metrics = DPO(beta=0.5)(outputs, batch).metrics
    margins = [0.5 * (w.h - b.h) for w, b in zip(rows[0::2], rows[1::2])]
    assert mean(metrics["accuracy"]) == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert mean(metrics["margin"]) == pytest.approx(sum(margins) / 3, rel=1e-6)
    assert mean(BradleyTerry()(outputs, batch).metrics["chosen_reward"]) == pytest.approx(
        sum(row.score for row in rows[0::2]) / 3, rel=1e-6
    )
