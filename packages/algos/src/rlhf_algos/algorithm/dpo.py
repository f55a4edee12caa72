"""Direct preference optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_algos.loss.chosen_nll import ChosenNLLLoss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import FREE, ModelOptions, TrackingOptions, TrainedOptions
from rlhf_core.contract.providers import Advantage, Algorithm, Loss
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError

__all__ = ["DPO"]


@dataclass(frozen=True)
class DPO(Algorithm):
    """Direct preference optimization on pairs (Rafailov et al. 2023): from data, with a reference.

    Works with every loss on pairs: --loss robust, hinge, …
    """

    nll: float = 0.0
    """weight of the chosen completions' mean negative log-likelihood (Pang et al. 2024 use 1); 0 leaves it out"""
    cache: str = field(default="", metadata=FREE)
    """folder that caches the reference's log-probabilities for later epochs and runs; empty caches nothing"""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "dpo"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=5e-7, schedule="linear", warmup=0.1)),
        "reference": TrackingOptions(),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        loss = chosen_loss(choices)
        term = Term("actor", "data", loss, self.credit(loss))
        if term.unit != 2:
            raise UsageError(
                f"the loss {type(term.loss).__qualname__} does not compare pairs, so it would also learn the "
                "rejected completions; choose dpo, ipo, cdpo, robust, hinge, simpo or orpo"
            )
        return (term, Term("actor", "data", ChosenNLLLoss(), weight=self.nll)) if self.nll else (term,)

    def credit(self, loss: Loss) -> Advantage | None:
        """Return the credit that the loss reads from the whole batch before it is split; None except in variants."""
        return None
