"""The penalty that keeps a policy near its reference: estimators, where they apply, and the adaptive coefficient.

With d = log pi(a|s) - log ref(a|s) on sampled tokens, E_pi[k] = KL(pi || ref) for k1 = d and k3 = exp(-d) - 1 + d; k2 = d^2/2
has the right gradient and a small bias (Schulman, "Approximating KL divergence", 2020). In the reward the value matters, so
any of the three serves. In the loss the gradient matters: differentiating k1's value gives zero in expectation, k2's gives
the gradient of KL(pi || ref), k3's that of KL(ref || pi). All three are offered because published results use them; any of
them can be given the gradient of KL(pi || ref) instead, on samples of an older policy too (`KL.unbiased`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Outputs, Reduction
from rlhf_core.contract.terms import Term
from rlhf_core.lazy import torch
from rlhf_core.training.old_logprobs import full_old_logprobs
from rlhf_core.training.reduction import Means

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import KL
    from rlhf_core.contract.providers import Advantage
    from rlhf_core.training.step_metrics import Meter

__all__ = ["KLController", "KLLoss", "kl_terms", "kl_values"]

BY_TOKEN = Reduction("token")
MAX_WEIGHT = 10.0  # of a sample of an older policy: bounds the variance of the unbiased gradient, as OpenRLHF does
PARTS = ("completions", "tokens", "sum", "waited")
"""Sums over the ranks of a step, from which its KL is computed: the last counts ranks that wait for the training pass."""
MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond it k3 would only overflow float32, and its gradient with it


def kl_values(
    logprobs_NT: Tensor, ref_logprobs_NT: Tensor, mask_NT: Tensor, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Per-token KL estimates (N, T), float32, zero outside the mask.

    With d = logprobs - ref_logprobs, k3 is evaluated with d bounded to at least -20. So neither it nor its gradient overflows.
    """
    d_NT = (logprobs_NT.float() - ref_logprobs_NT.float()).masked_fill(~mask_NT, 0.0)
    if estimator == "k1":
        return d_NT
    if estimator == "k2":
        return d_NT.square() / 2
    return torch.exp(-d_NT.clamp(min=-MAX_LOG_RATIO)) - 1 + d_NT


@dataclass(frozen=True)
class KLLoss(Loss):
    """The penalty as a loss with a live gradient, times the coefficient in force (`batch.step.kl_coef`).

    It compares whole distributions, as the reference's are, whatever truncation kept: what the policy would do outside of the
    kept sets is held too, and the penalty of a policy that is its reference is 0 (NeMo RL does the same).
    """

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """see `KL.estimator`"""
    reduction: Reduction = BY_TOKEN
    """averaging of tokens, as in the objective that it is added to"""
    unbiased: bool = False
    """see `KL.unbiased`"""

    rows_per_unit: ClassVar[int] = 1

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"full_logprobs_NT", "logprobs_NT"} if self.unbiased else {"full_logprobs_NT"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logprobs_NT", "old_logprobs_NT"} if self.unbiased else {"ref_logprobs_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        logprobs_NT, ref_NT, mask_NT = outputs["full_logprobs_NT"], batch["ref_logprobs_NT"], batch.mask_NT
        kl_NT = kl_values(logprobs_NT, ref_NT, mask_NT, self.estimator)
        metrics = {"kl": Metric.over(kl_NT, mask_NT)}
        if self.unbiased:
            ratio_NT = (outputs["logprobs_NT"] - batch["old_logprobs_NT"]).detach().float()
            log_weight_NT = ratio_NT.masked_fill(~mask_NT, 0.0)
            weight_NT = log_weight_NT.clamp(max=log(MAX_WEIGHT)).exp()
            slope_NT = weight_NT * kl_values(logprobs_NT, ref_NT, mask_NT, "k2")
            kl_NT = kl_NT.detach() + slope_NT - slope_NT.detach()
        return LossTerms(batch.step.kl_coef * kl_NT, self.reduction, metrics)


def kl_terms(
    kl: KL | None, role: str, source: str, advantage: Advantage | None, reduction: Reduction = BY_TOKEN
) -> tuple[Term, ...]:
    """The penalty's term, if it is in force and belongs in the loss; else none. `reduction` is that of the objective."""
    if kl is None or kl.coef == 0 or kl.where != "loss":
        return ()
    return (Term(role, source, KLLoss(kl.estimator, reduction, kl.unbiased), advantage),)


class KLController:
    """The coefficient in force. Fixed, or adaptive (Ziegler et al. 2019, section 2.2):

        coef <- coef * (1 + clip(KL / target - 1, -0.2, 0.2) * N / horizon)

    with KL the mean over completions of the summed per-token KL, and N the completions of the step.
    """

    def __init__(self, kl: KL) -> None:
        self.kl = kl
        self.coef = kl.coef

    def update(self, kl_mean: float, completions: int) -> None:
        """Move the coefficient after a step. A fixed one stays."""
        if self.kl.target is not None:
            error = min(max(kl_mean / self.kl.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * completions / self.kl.horizon

    def measure(self, source: str, batch: Batch, meter: Meter) -> None:
        """Log what the KL of a rank's batch adds to those of other ranks, for `settle`; nothing without a reference.

        It compares what the trainer computes, never an engine's log-probabilities with the reference's. Where the trainer has
        not computed the policy's yet, the training pass gives the KL.
        """
        if "ref_logprobs_NT" not in batch:
            return
        policy_NT = full_old_logprobs(batch)
        kl = 0.0
        if policy_NT is not None:
            kl = float(kl_values(policy_NT, batch["ref_logprobs_NT"], batch.mask_NT, self.kl.estimator).sum())
        parts = (float(len(batch)), float(batch.mask_NT.sum()), kl, float(policy_NT is None))
        for part, value in zip(PARTS, parts, strict=True):
            meter.log_total(f"kl/{part}/{source}", value)

    def settle(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics of a step, those of its KL among them, and move the coefficient.

        Where the KL waited for the training pass, it is that pass's mean over tokens (`KLLoss`), or absent if the step was
        skipped.
        """
        means = Means()
        prefix = f"kl/{PARTS[0]}/"
        for source in [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]:
            completions, tokens, kl, waited = (metrics.pop(f"kl/{part}/{source}") for part in PARTS)
            if waited and f"{source}/kl" not in metrics:
                continue
            kl = metrics[f"{source}/kl"] * tokens if waited else kl
            of_completion = kl / max(1.0, completions)
            for name, value in (("mean", kl / max(1.0, tokens)), ("completion", of_completion), ("coef", self.coef)):
                means.add(f"kl/{name}", value)
            self.update(of_completion, int(completions))
        return metrics | means.reduce()
