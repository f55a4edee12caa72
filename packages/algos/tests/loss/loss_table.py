"""Shared tables of the loss tests: a hostile example, and every loss with its formula in plain floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from statistics import fmean
from typing import Any

import torch

from rlhf_algos.correction import Correction
from rlhf_algos.loss.apo_down import APODownLoss
from rlhf_algos.loss.apo_zero import APOZeroLoss
from rlhf_algos.loss.bradley_terry import BradleyTerryLoss
from rlhf_algos.loss.cdpo import CDPOLoss
from rlhf_algos.loss.chosen_nll import ChosenNLLLoss
from rlhf_algos.loss.cispo import CISPOLoss
from rlhf_algos.loss.clip import ClipLoss
from rlhf_algos.loss.dapo import DAPOLoss
from rlhf_algos.loss.discopop import DiscoPOPLoss
from rlhf_algos.loss.dpo import DPOLoss
from rlhf_algos.loss.dppo import DPPOLoss
from rlhf_algos.loss.dr_grpo import DrGRPOLoss
from rlhf_algos.loss.entropy import EntropyLoss
from rlhf_algos.loss.exo_pair import EXOPairLoss
from rlhf_algos.loss.grpo import GRPOLoss
from rlhf_algos.loss.gspo import GSPOLoss
from rlhf_algos.loss.hinge import HingeLoss
from rlhf_algos.loss.ipo import IPOLoss
from rlhf_algos.loss.kto import KTOLoss
from rlhf_algos.loss.nca_pair import NCAPairLoss
from rlhf_algos.loss.orpo import ORPOLoss
from rlhf_algos.loss.prm import PRMLoss
from rlhf_algos.loss.reinforce import ReinforceLoss
from rlhf_algos.loss.robust import RobustLoss
from rlhf_algos.loss.sapo import SAPOLoss
from rlhf_algos.loss.sft import SFTLoss
from rlhf_algos.loss.sigmoid_norm import SigmoidNormLoss
from rlhf_algos.loss.simpo import SimPOLoss
from rlhf_algos.loss.sppo_hard import SPPOHardLoss
from rlhf_algos.loss.value import ValueLoss
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.results import Reduction
from rlhf_core.testing.batches import make_batch

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


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def discopop(x: float, tau: float) -> float:
    m = sigmoid(x / tau)
    return -(1 - m) * log_sigmoid(x) + m * exp(-x)


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


def sapo(x: Token, tau_pos: float, tau_neg: float) -> float:
    tau = tau_pos if x.advantage > 0 else tau_neg
    return -4 / tau / (1 + exp(-tau * (x.ratio - 1))) * x.advantage


def dppo(distance: Callable[[Token], float], delta: float) -> Callable[[Token], float]:
    """The surrogate without tokens that are too far from the sampler and would go further."""

    def formula(x: Token) -> float:
        ratio = exp(x.lp - x.sampler)
        further = (x.advantage > 0 and ratio > 1) or (x.advantage < 0 and ratio < 1)
        return 0.0 if further and distance(x) > delta else -ratio * x.advantage

    return formula


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
    (ClipLoss(), Reduction("token"), ppo(0.2, 0.2)),
    (ClipLoss(clip_low=0.1, clip_high=0.28), Reduction("token"), ppo(0.1, 0.28)),
    (ClipLoss(dual_clip=1.5), Reduction("token"), ppo(0.2, 0.2, 1.5)),
    (ClipLoss(aggregate="constant", length=7), Reduction("constant", 7), ppo(0.2, 0.2)),
    (ClipLoss(aggregate="sum"), Reduction("sum"), ppo(0.2, 0.2)),
    (GRPOLoss(), Reduction("sequence"), ppo(0.2, 0.2)),
    (ReinforceLoss(), Reduction("constant", 1), lambda x: -x.advantage * x.lp),
    (DrGRPOLoss(length=9), Reduction("constant", 9), ppo(0.2, 0.2)),
    (DAPOLoss(), Reduction("token"), ppo(0.2, 0.28)),
    (GSPOLoss(), Reduction("sequence"), gspo(3e-4, 4e-4)),
    (GSPOLoss(clip_low=0.2, clip_high=0.3), Reduction("sequence"), gspo(0.2, 0.3)),
    (CISPOLoss(), Reduction("token"), lambda x: -min(x.ratio, 5.0) * x.advantage * x.lp),
    (
        CISPOLoss(clip_low=0.1, clip_high=0.2),
        Reduction("token"),
        lambda x: -clip(x.ratio, 0.9, 1.2) * x.advantage * x.lp,
    ),
    (SAPOLoss(), Reduction("sequence"), lambda x: sapo(x, 1.0, 1.05)),
    (SAPOLoss(tau_pos=2.0, tau_neg=7.0, aggregate="token"), Reduction("token"), lambda x: sapo(x, 2.0, 7.0)),
    (DPPOLoss(delta=0.05), Reduction("token"), dppo(lambda x: abs(exp(x.sampler) - exp(x.lp)), 0.05)),
    (
        DPPOLoss(divergence="kl", delta=0.01),
        Reduction("token"),
        dppo(lambda x: coins(x.sampler, x.lp), 0.01),
    ),
    (
        ClipLoss(correction=Correction("token", "clip", high=1.3)),
        Reduction("token"),
        lambda x: min(x.rho, 1.3) * ppo(0.2, 0.2)(x),
    ),
    (ValueLoss(clip=0), Reduction("token"), lambda x: (x.value - x.target) ** 2 / 2),
    (ValueLoss(), Reduction("token"), lambda x: clipped_value(x, 0.2)),
    (ValueLoss(clip=0.5, aggregate="sequence"), Reduction("sequence"), lambda x: clipped_value(x, 0.5)),
    (SFTLoss(), Reduction("token"), lambda x: -x.lp),
    (SFTLoss(aggregate="sequence"), Reduction("sequence"), lambda x: -x.lp),
    (EntropyLoss(), Reduction("token"), lambda x: -x.entropy),
    *((ReinforceLoss(correction=each), Reduction("constant", 1), corrected(weight)) for each, weight in CORRECTIONS),
]

PAIRS: list[tuple[Any, Callable[[Completion, Completion], float]]] = [
    (DPOLoss(), lambda w, b: -log_sigmoid(0.1 * (w.h - b.h))),
    (DPOLoss(beta=0.7), lambda w, b: -log_sigmoid(0.7 * (w.h - b.h))),
    (
        CDPOLoss(beta=0.3, label_smoothing=0.2),
        lambda w, b: -0.8 * log_sigmoid(x := 0.3 * (w.h - b.h)) - 0.2 * log_sigmoid(-x),
    ),
    (
        RobustLoss(beta=0.3, label_smoothing=0.2),
        lambda w, b: (-0.8 * log_sigmoid(x := 0.3 * (w.h - b.h)) + 0.2 * log_sigmoid(-x)) / 0.6,
    ),
    (HingeLoss(beta=0.9), lambda w, b: max(0.0, 1 - 0.9 * (w.h - b.h))),
    (IPOLoss(beta=0.2), lambda w, b: (w.h - b.h - 2.5) ** 2),
    (IPOLoss(beta=0.2, per="token"), lambda w, b: (w.h / len(w.tokens) - b.h / len(b.tokens) - 2.5) ** 2),
    (SigmoidNormLoss(), lambda w, b: -log_sigmoid(5 * (w.h / len(w.tokens) - b.h / len(b.tokens)))),
    (EXOPairLoss(), lambda w, b: coins(log_sigmoid(0.1 * (w.h - b.h)), log(0.999))),
    (EXOPairLoss(beta=0.7, label_smoothing=0.2), lambda w, b: coins(log_sigmoid(0.7 * (w.h - b.h)), log(0.8))),
    (
        NCAPairLoss(beta=0.8),
        lambda w, b: -log_sigmoid(x := 0.8 * w.h) - log_sigmoid(-x) / 2 - log_sigmoid(-0.8 * b.h) / 2,
    ),
    (SPPOHardLoss(beta=0.4), lambda w, b: (w.h - 1.25) ** 2 + (b.h + 1.25) ** 2),
    (APOZeroLoss(beta=0.9), lambda w, b: 1 - sigmoid(0.9 * w.h) + sigmoid(0.9 * b.h)),
    (APODownLoss(beta=0.9), lambda w, b: sigmoid(0.9 * w.h) + 1 - sigmoid(0.9 * (w.h - b.h))),
    (DiscoPOPLoss(), lambda w, b: discopop(0.1 * (w.h - b.h), 0.05)),
    (DiscoPOPLoss(beta=0.8, tau=0.6), lambda w, b: discopop(0.8 * (w.h - b.h), 0.6)),
    (SimPOLoss(), lambda w, b: -log_sigmoid(2 * (w.mean_lp - b.mean_lp) - 1)),
    (SimPOLoss(beta=2.5, gamma=0.3), lambda w, b: -log_sigmoid(2.5 * (w.mean_lp - b.mean_lp) - 0.3)),
    (ORPOLoss(lam=0.4), lambda w, b: -w.mean_lp - 0.4 * log_sigmoid(log_odds(w.mean_lp) - log_odds(b.mean_lp))),
    (ChosenNLLLoss(), lambda w, b: -w.mean_lp),
    (BradleyTerryLoss(), lambda w, b: log(1 + exp(b.score - w.score))),
    (BradleyTerryLoss(margin=True), lambda w, b: -log_sigmoid(w.score - b.score - w.margin)),
    (BradleyTerryLoss(center=0.3), lambda w, b: -log_sigmoid(w.score - b.score) + 0.3 * (w.score + b.score) ** 2),
]

ROWS: list[tuple[Any, Callable[[Completion], float]]] = [
    (KTOLoss(), lambda x: kto(x, 0.1)),
    (KTOLoss(beta=0.6), lambda x: kto(x, 0.6)),
    (PRMLoss(placeholder=7), lambda x: sum(steps := judged_steps(x)) / max(1, len(steps))),
]

EVERY = [row[0] for row in (*TOKENS, *PAIRS, *ROWS)]
