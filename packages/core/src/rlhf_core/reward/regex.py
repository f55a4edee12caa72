"""`--reward regex`: whether a completion has a wanted form, for example `<think>…</think><answer>…</answer>`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.providers import Reward
from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["Regex"]


@dataclass(frozen=True)
class Regex(Reward):
    """1 if the completion matches a regular expression, else 0."""

    pattern: str
    """regular expression in Python's syntax; the dot also matches line ends"""
    match: Literal["whole", "anywhere", "none"] = "whole"
    """required match: the whole completion (except surrounding blanks), some part of it, or no part"""

    raw: bool = False
    """match the text with its special tokens, for models where <think> is one"""

    def check(self) -> None:
        """Raise `OptionError` for a pattern that is not one, before models are loaded."""
        self._compile()

    def _compile(self) -> re.Pattern[str]:
        try:
            return re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise OptionError("pattern", f"{self.pattern!r} is not a regular expression: {error}") from None

    def __call__(self, rollouts: Rollouts) -> list[float]:
        pattern = self._compile()
        texts = rollouts.raw_texts if self.raw and rollouts.raw_texts else rollouts.texts
        if self.match == "whole":
            return [float(pattern.fullmatch(text.strip()) is not None) for text in texts]
        return [float((pattern.search(text) is None) == (self.match == "none")) for text in texts]
