"""Options of an evaluation by attacks: those of the attack, and what is attacked, asked and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rlhf_core import OptionError, Reward, make_from_spec
from rlhf_core.contract.ranges import at_least
from rlhf_eval_gcg.attack import Attack, Goal
from rlhf_eval_gcg.attack.options import SCHEDULES
from rlhf_eval_gcg.goals.reader import HARMLESS, GoalColumns, read_goals

__all__ = ["GCGOptions"]


@dataclass(frozen=True)
class GCGOptions(Attack):
    """Everything that a user of the evaluator chooses."""

    goals: str | tuple[tuple[str, str], ...] = HARMLESS
    """.csv, .json or .jsonl file with columns goal and target (or target alone), hub set OWNER/NAME[:CONFIG],
    `harmless` (a small set that is included), or (goal, target) pairs"""
    rows: str = ""
    """goals to attack, as a slice such as :10 or 10:; empty attacks all"""
    goal_key: str = "goal"
    """column of the questions"""
    target_key: str = "target"
    """column of the targets, the beginnings of bad answers"""
    split: str = "train"
    """split of a hub set"""
    seeds: tuple[int, ...] = (0,)
    """seeds of the attacks; every goal is attacked once with each"""
    n: int = 16
    """number of answers sampled per goal, without a suffix and with each; --sampling sets their options"""
    batch: int = 8
    """number of goals sampled together; changes memory and speed, never results"""
    judge: str = ""
    """reward that judges answers, by name with its options, such as "refusal within=80"; empty takes the run's reward,
    or `refusal` if it has none"""
    judge_suffix: bool = True
    """let the judge read goal and suffix as the prompt, also within objective `reward`; False shows it the goal alone"""
    threshold: float | None = None
    """threshold of bad answers in metrics: rewards strictly below it; `none` takes 0.5 for the judge refusal, -0.5 for
    strongreject and harmbench, and logs no success for others"""
    end_only: bool = False
    """attack only after a run's last step, neither at its start nor every --eval-every steps"""
    export: str = ""
    """JSONL file for the attacked prompts, which --data json reads; empty writes none"""
    draft: str = ""
    """model for schedule probe, a hub name or folder: a small one with the policy's tokenizer"""
    more_models: tuple[str, ...] = ()
    """further models that each suffix must also work on, hub names or folders, with the policy's tokenizer"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "n", "batch")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise OptionError("seeds", f"must be one or more different numbers, not {self.seeds}")
        if min(self.seeds) < 0:
            raise OptionError("seeds", f"must be at least 0, not {min(self.seeds)}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise OptionError("threshold", "must be a number, not nan, below which no reward is")
        if self.export and Path(self.export).is_dir():
            raise OptionError("export", f"{self.export} is a folder; name a file in it")
        if self.draft and self.schedule in SCHEDULES and self.schedule != "probe":
            raise OptionError("draft", f"works only with schedule probe, not {self.schedule}; leave it out")
        if self.schedule == "probe" and not self.draft:
            raise OptionError("draft", "must name a small model with the policy's tokenizer, since schedule is probe")

    def read(self) -> list[Goal]:
        """Return the goals to attack."""
        columns = GoalColumns(goal=self.goal_key, target=self.target_key, split=self.split)
        return read_goals(self.goals, columns, self.rows)

    def make_judge(self) -> Reward | None:
        """Return the chosen judge; None for the run's reward.

        Raises:
            OptionError: there is no such reward, or it reads roles.
        """
        if not self.judge:
            return None
        judge: Reward = make_from_spec("reward", self.judge, "judge")
        if judge.needs:
            raise OptionError(
                "judge", f"{self.judge}: a judge cannot read roles; choose it as the run's reward instead"
            )
        return judge
