"""Alignment via optimal transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.advantage.aot import AOTCredit
from rlhf_algos.algorithm.dpo import DPO
from rlhf_algos.compose import OFFLINE
from rlhf_algos.loss.aot import AOTLoss
from rlhf_core.contract.providers import Advantage, Loss
from rlhf_core.errors import UsageError, run_option

__all__ = ["AOT"]


@dataclass(frozen=True)
class AOT(DPO):
    """Optimal transport between the sorted rewards of pairs (Melnyk et al. 2024): from data, with a reference.

    The larger the batch, the better its sorted samples stand for the distributions.
    """

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "aot"}

    def credit(self, loss: Loss) -> Advantage:
        if not isinstance(loss, AOTLoss):
            raise UsageError(
                f"the algorithm aot works only with the loss aot, not {type(loss).__qualname__}; choose "
                f"{run_option('loss', 'aot')}, or the algorithm dpo"
            )
        return AOTCredit(loss.paired)
