"""`--reward json`: whether a completion is JSON, with the keys that were asked for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from rlhf_core.contract.providers import Reward

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["ValidJson"]

FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*)```\s*", re.DOTALL)


@dataclass(frozen=True)
class ValidJson(Reward):
    """1 if the completion is valid JSON, else 0."""

    keys: tuple[str, ...] = ()
    """keys that the object must have at least"""
    fenced: bool = True
    """allow a Markdown fence around the JSON"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [float(self._valid(text)) for text in rollouts.texts]

    def _valid(self, text: str) -> bool:
        fence = FENCE.fullmatch(text) if self.fenced else None
        try:
            value = json.loads(fence.group(1) if fence else text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        return not self.keys or (isinstance(value, dict) and value.keys() >= set(self.keys))


def _refuse(constant: str) -> NoReturn:
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)
