"""Rows whose prompt states the quality of the completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from statistics import fmean, stdev

from rlhf_core.contract.batch import Example
from rlhf_core.data.json import Json
from rlhf_core.errors import OptionError

__all__ = ["ConditionalData"]


@dataclass(frozen=True)
class ConditionalData(Json):
    """Rows of a JSON file with the completion's reward in the prompt (Hu et al. 2023; OpenRLHF's csft).

    `rlhf-run generate` and `rlhf-run score` make such files. A model that was trained on them is asked for the best with
    --data conditional --data.target NUMBER.
    """

    _: KW_ONLY
    reward_key: str = "reward"
    """column of the reward"""
    condition: str = "{prompt} <rm_score>: {reward} "
    """template that replaces a prompt (in a chat, its last message): {prompt} and {reward}, with two decimals"""
    normalize: bool = False
    """write the reward as the number of standard deviations above the mean of the training rows"""
    target: float | None = None
    """reward that is written into every row, as the request to be answered; rows then need no reward"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("{prompt}", "{reward}"):
            if name not in self.condition:
                raise OptionError("condition", f"must contain {name}, but it is {self.condition!r}")

    def __call__(self, split: str) -> Sequence[Example]:
        if self.target is not None:
            target = self.target
            return [self._add_condition(row, target) for row in super().__call__(split)]
        reading = replace(self, number_keys=(*self.number_keys, self.reward_key))
        rows = Json.__call__(reading, split)
        mean, std = (
            self._scale(rows if split == "train" else Json.__call__(reading, "train")) if self.normalize else (0, 1)
        )
        return [self._add_condition(row, (row.fields[self.reward_key] - mean) / std) for row in rows]

    def _scale(self, rows: Sequence[Example]) -> tuple[float, float]:
        """Mean and unbiased standard deviation of the rewards of `rows`."""
        rewards = [row.fields[self.reward_key] for row in rows]
        spread = stdev(rewards) if len(rewards) > 1 else 0.0
        return fmean(rewards), spread or 1.0  # equal rewards have no scale

    def _add_condition(self, row: Example, reward: float) -> Example:
        """Return the row with its reward in the prompt."""
        if isinstance(row.prompt, str):
            return replace(row, prompt=self._render_condition(row.prompt, reward))
        *before, last = row.prompt
        return replace(row, prompt=(*before, {**last, "content": self._render_condition(str(last["content"]), reward)}))

    def _render_condition(self, prompt: str, reward: float) -> str:
        return self.condition.replace("{prompt}", prompt).replace("{reward}", f"{reward:.2f}")
