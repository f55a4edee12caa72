"""`--reward keep_bad`: another reward, which also saves the samples that it rates as bad, from any role.

    rlhf-run repulse --reward keep_bad --reward.of "model model=folder" --reward.threshold -5 --reward.path bad.jsonl

Each prompt and completion is kept once, by token ids; `--evaluator bad_samples` measures a policy on such a file. The original
(`--save_negdata`) kept decoded text in a pickle at the end of a run; here nothing is lost when a run is killed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Reward
from rlhf_core.errors import OptionError, UsageError
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.sum import Sum

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.results import RewardOutput

__all__ = ["KeepBad"]


@dataclass(frozen=True)
class KeepBad(Reward):
    """Scores of another reward, unchanged; samples with scores below a threshold are saved to a JSONL file."""

    of: str
    """reward provider (for example "length target=40"), by name with its options"""
    threshold: float = -5.0
    """threshold: rewards strictly below it are kept"""
    path: str = "bad_samples.jsonl"
    """file that samples are appended to: prompt_ids, ids, prompt, completion, reward"""

    def check(self) -> None:
        """Let the reward check what it needs."""
        self._inner.check()

    def open(self, context: OpenContext) -> KeepBadEngine:
        """Open the reward, and read what the file has.

        Raises:
            OptionError: the file has something else than bad samples.
        """
        return KeepBadEngine(self, context.open(self._inner, "of"))

    @property
    def _inner(self) -> Sum:
        return Sum((self.of,), path="of")


class KeepBadEngine:
    """An open reward, and the samples that the file has.

    Args:
        reward: the options.
        inner: the open reward.
    """

    def __init__(self, reward: KeepBad, inner: Any) -> None:
        self.reward, self.inner, self.path = reward, inner, Path(reward.path)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        try:
            self.known = {_key(json.loads(line)) for line in lines}
        except (ValueError, KeyError):
            raise OptionError("path", f"{self.path} is not a file of bad samples; name another file") from None

    def close(self) -> None:
        """Nothing to do: each write is complete, and the run closes the reward."""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        if any(rollouts.images):
            raise UsageError("reward keep_bad cannot store images; choose the inner reward without keep_bad")
        output = to_reward_output(self.inner(rollouts), rollouts, self.reward)
        rows = []
        for i, (reward, answered) in enumerate(zip(output.total_N.tolist(), output.answered_N.tolist(), strict=True)):
            if answered and reward < self.reward.threshold:
                ids = [
                    rollouts.prompt_NL[i, : rollouts.prompt_lengths_N[i]],
                    rollouts.tokens_NT[i, : rollouts.lengths_N[i]],
                ]
                row = {"prompt_ids": ids[0].tolist(), "ids": ids[1].tolist(), "prompt": rollouts.prompts[i]}
                rows.append({**row, "completion": rollouts.texts[i], "reward": reward})
        self._keep(rows)
        return output

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        """Add the rows that are new, in one write: what is killed loses none, and ranks may share the file."""
        new = {_key(row): row for row in rows if _key(row) not in self.known}
        if not new:
            return
        self.known.update(new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new.values()))


def _key(row: dict[str, Any]) -> str:
    return f"{row['prompt_ids']}{row['ids']}"
