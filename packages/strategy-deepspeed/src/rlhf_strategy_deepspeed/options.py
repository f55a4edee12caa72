"""Options of the strategy `deepspeed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_core.errors import UsageError

__all__ = ["DeepSpeedOptions"]


@dataclass(frozen=True)
class DeepSpeedOptions:
    """Options of DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 2
    """what is sharded: 0 nothing, 1 optimiser states, 2 gradients too, 3 weights too"""
    bucket: int | None = None
    """elements that are reduced or gathered in one call; 50 million where absent"""
    overlap: bool | None = None
    """communicate while the backward pass runs (stages 2 and 3); yes where absent"""
    persist: int | None = None
    """stage 3: weights with fewer elements stay whole on every rank; 100,000 where absent"""
    config: str = ""
    """JSON file with further DeepSpeed settings; may say "auto" for, but not contradict, what the run decides itself"""
    show_config: bool = False
    """print the DeepSpeed configuration of each role before it is built"""

    def __post_init__(self) -> None:
        for name in ("bucket", "persist"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if self.overlap and self.stage < 2:
            raise UsageError(
                f"overlap needs stage 2 or 3, not {self.stage}; before that nothing is sent in the backward pass"
            )
