"""Conservative direct preference optimization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.algorithm.dpo import DPO
from rlhf_algos.compose import OFFLINE

__all__ = ["CDPO"]


@dataclass(frozen=True)
class CDPO(DPO):
    """DPO for labels that are sometimes wrong (Mitchell 2023): from data, with a reference."""

    defaults: ClassVar[Mapping[str, str]] = {**OFFLINE, "loss": "cdpo"}
