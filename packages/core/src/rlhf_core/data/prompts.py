"""`--data prompts`: the prompts that come with the package.

200 short everyday prompts, written for this project, whose answers can take any tone. Every fourth is held out; the
split is written in the file and never changes, so that results on it can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar

from rlhf_core.contract.batch import Example, Message
from rlhf_core.data.prepare import Preparation
from rlhf_core.errors import UsageError

__all__ = ["ShippedPrompts"]

FILE = "shipped_prompts.jsonl"


@dataclass(frozen=True)
class ShippedPrompts(Preparation):
    """150 everyday prompts that come with the package, and 50 held out."""

    runs_ahead: ClassVar[bool] = True

    system: str = ""
    """system prompt put before every prompt, which turns each prompt into a chat"""

    def __call__(self, split: str) -> Sequence[Example]:
        lines = files("rlhf_core.data").joinpath(FILE).read_text(encoding="utf-8").splitlines()
        rows = [(number, json.loads(line)) for number, line in enumerate(lines, start=1)]
        examples = [
            Example(self._prompt(row["prompt"]), origin=f"{FILE}:{number}")
            for number, row in rows
            if row["split"] == split
        ]
        if not examples:
            raise UsageError(f"the shipped prompts have only the splits train and heldout, not {split!r}")
        return examples

    def _prompt(self, text: str) -> str | tuple[Message, ...]:
        """Return the prompt as it is, or as a chat that begins with the system prompt."""
        if not self.system:
            return text
        return ({"role": "system", "content": self.system}, {"role": "user", "content": text})
