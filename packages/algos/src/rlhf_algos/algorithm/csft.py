"""Conditional supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_algos.algorithm.sft import SFT

__all__ = ["CSFT"]


@dataclass(frozen=True)
class CSFT(SFT):
    """Fine-tuning with the reward in the prompt, so that users can request a good answer (Hu et al. 2023): from data.

    Learns from bad completions too, as examples of what a low reward looks like.
    """

    defaults: ClassVar[Mapping[str, str]] = {"data": "conditional", "loss": "sft"}
