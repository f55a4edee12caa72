"""Kahneman-Tversky optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlhf_algos.compose import OFFLINE, chosen_loss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import FREE, ModelOptions, TrackingOptions, TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError, run_option

__all__ = ["KTO"]


@dataclass(frozen=True)
class KTO(Algorithm):
    """Alignment from single completions judged good or bad (Ethayarajh et al. 2024): from data, with a reference.

    Data with labels, one completion per row; or pairs, whose chosen completions are desirable and rejected ones not.
    """

    cache: str = field(default="", metadata=FREE)
    """folder that caches the reference's log-probabilities for later epochs and runs; empty caches nothing"""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "advantage": "kto", "loss": "kto"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=5e-7, schedule="linear", warmup=0.1)),
        "reference": TrackingOptions(),
    }
    config_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 32}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        term = Term("actor", "data", chosen_loss(choices), choices.advantage)
        if "advantages_NT" not in term.needs:
            raise UsageError(
                f"the loss {type(term.loss).__qualname__} does not read which rows are desirable; use "
                f"{run_option('loss', 'kto')}"
            )
        return (term,)
