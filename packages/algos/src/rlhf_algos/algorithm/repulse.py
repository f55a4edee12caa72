"""RePULSe: a policy-gradient algorithm that also lowers the probability of what a learned proposal digs up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_algos.advantage.ctl import CTLAdvantage
from rlhf_algos.advantage.negative import NegativeAdvantage
from rlhf_algos.advantage.sixo_negatives import SixoNegativesAdvantage
from rlhf_algos.compose import ONLINE, POLICY_ROLES, policy_terms
from rlhf_algos.loss.value import ValueLoss
from rlhf_algos.loss.weighted_nll import WeightedNLLLoss
from rlhf_algos.target import Target
from rlhf_algos.twist import Psi
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import KL, ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError, option

if TYPE_CHECKING:
    from rlhf_core.contract.providers import Loss

__all__ = ["RePULSe"]


@dataclass(frozen=True)
class RePULSe(Algorithm):
    """Reduces the probability of rare bad outputs (Zhao et al. 2025): a proposal finds them, the policy unlearns them.

    The proposal learns from its own samples (CTL credit). The actor learns from its own samples by the chosen advantage and
    loss (RLOO, REINFORCE), and unlearns those of the proposal (negative training). With an advantage of a critic's values
    (`gae`) a critic learns from the actor's samples. All credit of a step is assigned before any model moves.
    """

    target: Target = Target()
    """the distribution of bad outputs that the proposal learns, and that the policy unlearns"""
    alpha: float = 0.02
    """strength of the negative term, relative to the expected reward (eq. 4); with `compat original`, N times that"""
    start_alpha: float | None = None
    """alpha at the start, which moves geometrically to `alpha` over the run; constant by default"""
    proposal: Literal["learned", "base"] = "learned"
    """model that finds bad outputs: a second model, also sampled (2N samples per prompt); or the policy itself, with
    weighted samples"""
    proposal_updates: int = 1
    """proposal updates per policy update; the policy is sampled and updated only in every such step of the run"""
    psi: Psi = "q_p_s_t"
    """the proposal's twist: its log-ratio to the policy at token t, of all tokens up to t, or its raw logit over the policy"""
    contrast: Literal["prefix", "none", "sixo", "sixo_exact"] = "prefix"
    """the proposal's negative term: CTL's, none (weighted likelihood, DPG), or SIXO's with reweighted or exact negatives;
    the last samples the policy in every step"""
    weighting: Literal["importance", "uniform"] = "importance"
    """weights of the samples in the negative term: towards the target, or all equal"""
    weighting_beta: float | None = None
    """beta of the weights in the negative term; the target's beta by default"""
    objective: Literal["likelihood", "reinforce"] = "likelihood"
    """the negative term lowers the likelihood of bad outputs, or is REINFORCE on them (appendix C.2)"""
    compat: Literal["paper", "original"] = "paper"
    """scale of all losses: sums over tokens as in the paper, or the released code's means over tokens and completions"""
    kl: KL = KL(coef=0.0, estimator="k1", where="reward")
    """penalty that keeps the policy near the reference; it never applies to the proposal's samples"""
    value: ValueLoss = ValueLoss()
    """the critic's objective, for advantages that use a critic"""

    defaults: ClassVar[Mapping[str, str]] = {**ONLINE, "advantage": "rloo", "loss": "reinforce"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        **POLICY_ROLES,
        "proposal": TrainedOptions(optim=AdamW(lr=1e-6)),
        "critic": TrainedOptions(optim=AdamW(lr=1e-5)),
    }

    def __post_init__(self) -> None:
        if self.proposal_updates < 1:
            raise UsageError(f"proposal_updates must be at least 1, not {self.proposal_updates}")
        if self.proposal == "base" and self.proposal_updates > 1:
            raise UsageError(
                f"with {option('proposal', 'base')} there is no proposal to update; leave out "
                f"{option('proposal_updates')}"
            )

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        if self.compat == "original":
            choices = replace(choices, loss=_sequence_means(choices.loss))
        weighted = WeightedNLLLoss("prompt" if self.compat == "paper" else "sequence")
        learned = self.proposal == "learned"
        negative = Term("actor", "proposal" if learned else "actor", weighted, self._negative(learned))
        terms = (*policy_terms(choices, self.kl), negative)
        if choices.advantage is not None and "values_NT" in choices.advantage.needs:
            terms += (Term("critic", "actor", self._value(), choices.advantage),)
        if not learned:
            return terms
        terms = tuple(replace(term, every=self.proposal_updates) for term in terms)
        twisted = replace(weighted, output="logits_NT" if self.psi == "unnormalized" else "logprobs_NT")
        terms += (Term("proposal", "proposal", twisted, CTLAdvantage(self.target, self.psi, self.contrast)),)
        if self.contrast == "sixo_exact":
            terms += (Term("proposal", "actor", twisted, SixoNegativesAdvantage(self.psi)),)
        return terms

    def _value(self) -> ValueLoss:
        """The critic's objective, in the scale of the others."""
        return replace(self.value, aggregate="sequence") if self.compat == "original" else self.value

    def _negative(self, learned: bool) -> NegativeAdvantage:
        """The credit of the negative term."""
        target = self.target
        if self.weighting_beta is not None:
            target = replace(target, beta=self.weighting_beta, start_beta=None)
        weighting = self.weighting if learned or self.weighting == "uniform" else "reward"
        return NegativeAdvantage(target, self.alpha, self.start_alpha, weighting, self.objective)


def _sequence_means(loss: Loss | None) -> Loss:
    """The chosen policy loss, averaged as the released code does."""
    if loss is None or loss.aggregate is None:
        raise UsageError(
            f"{option('compat', 'original')} sets the aggregate of the loss, but {type(loss).__name__} has none; "
            "leave it out"
        )
    averaged: Any = replace(loss, aggregate="sequence")  # type: ignore[type-var]
    return averaged  # type: ignore[no-any-return]
