"""`--reward exact`: whether a completion is the reference answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Reward
from rlhf_core.reward.output import require_labels

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["ExactMatch"]


@dataclass(frozen=True)
class ExactMatch(Reward):
    """1 if the completion is the label (one of them, if it is a list), else 0; surrounding blanks are ignored."""

    ignore_case: bool = True
    """ignore case in the comparison"""
    extract: str = ""
    """regular expression whose last match in the completion (its first group, if there is one) is the answer"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        require_labels(rollouts, "exact")
        return [float(self._right(text, label)) for text, label in zip(rollouts.texts, rollouts.labels)]

    def _right(self, text: str, label: Any) -> bool:
        if self.extract:
            found = list(re.finditer(self.extract, text))
            text = found[-1].group(min(1, found[-1].re.groups)) or "" if found else ""
        references = label if isinstance(label, list) else [label]
        return self._normalize(text) in {self._normalize(str(reference)) for reference in references}

    def _normalize(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
