"""Binary classifier optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.advantage.bco import BCOCredit
from rlhf_algos.algorithm.dpo import DPO
from rlhf_algos.compose import OFFLINE
from rlhf_algos.loss.bco_pair import BCOPairLoss
from rlhf_core.contract.providers import Advantage, Loss
from rlhf_core.errors import UsageError, run_option

__all__ = ["BCOPair"]


@dataclass(frozen=True)
class BCOPair(DPO):
    """A classifier of chosen and rejected completions (Jung et al. 2024): from data, with a reference."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "bco_pair"}

    def credit(self, loss: Loss) -> Advantage:
        if not isinstance(loss, BCOPairLoss):
            raise UsageError(
                f"the algorithm bco_pair works only with the loss bco_pair, not {type(loss).__qualname__}; choose "
                f"{run_option('loss', 'bco_pair')}, or the algorithm dpo"
            )
        return BCOCredit()
