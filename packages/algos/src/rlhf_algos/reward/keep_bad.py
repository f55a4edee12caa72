"""`--reward keep_bad`: another reward, which also keeps what it finds bad in a file, whoever sampled it.

    rlhf-run repulse --reward keep_bad --reward.of "model model=folder" --reward.threshold -5 --reward.path bad.jsonl

Each prompt and completion is kept once, by token ids; `--evaluator bad_samples` measures a policy on such a file. The original
(`--save_negdata`) kept decoded text in a pickle at the end of a run; here nothing is lost when a run is killed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Reward
from rlhf_core.errors import OptionError, UsageError
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.sum import Sum

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["KeepBad"]


@dataclass(frozen=True)
class KeepBad(Reward):
    """Another reward, unchanged; samples that it scores below a threshold are kept in a JSONL file."""

    of: str
    """the reward, by name with its options, as "length target=40" """
    threshold: float = -5.0
    """rewards strictly below it are kept"""
    path: str = "bad_samples.jsonl"
    """file that samples are added to: prompt_ids, ids, prompt, completion, reward"""

    def check(self) -> None:
        """What the reward says is missing."""
        self._reward.check()

    def close(self) -> None:
        """Free what the reward holds."""
        self._reward.close()

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        if any(rollouts.images):
            raise UsageError("reward keep_bad keeps tokens and no images; choose the reward by itself")
        output = to_reward_output(self._reward(rollouts), rollouts, self)
        rows = []
        for i, reward in enumerate(output.total_N.tolist()):
            if reward < self.threshold:
                ids = [
                    rollouts.prompt_NL[i, : rollouts.prompt_lengths_N[i]],
                    rollouts.tokens_NT[i, : rollouts.lengths_N[i]],
                ]
                row = {"prompt_ids": ids[0].tolist(), "ids": ids[1].tolist(), "prompt": rollouts.prompts[i]}
                rows.append({**row, "completion": rollouts.texts[i], "reward": reward})
        self._keep(rows)
        return output

    @cached_property
    def _reward(self) -> Any:
        return Sum((self.of,), path="of")

    @cached_property
    def _known_rows(self) -> set[str]:
        """What the file has, of this run or an earlier one."""
        path = Path(self.path)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            return {_key(json.loads(line)) for line in lines}
        except (ValueError, KeyError):
            raise OptionError("path", f"{path} holds something else than bad samples; name another file") from None

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        """Add the rows that are new, in one write: what is killed loses none, and ranks may share the file."""
        new = {_key(row): row for row in rows if _key(row) not in self._known_rows}
        if not new:
            return
        self._known_rows.update(new)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with Path(self.path).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new.values()))


def _key(row: dict[str, Any]) -> str:
    return f"{row['prompt_ids']}{row['ids']}"
