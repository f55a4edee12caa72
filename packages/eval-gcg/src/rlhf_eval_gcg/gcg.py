"""The evaluator `gcg`: attacks a policy, lets it answer, and counts how often the answer is bad.

    rlhf-run eval MODEL --evaluator gcg --evaluator.goals FILE.csv --evaluator.steps 250 --output DIR

The attack does not know the judge: it makes a target likely (Zou et al. 2023, arXiv:2307.15043, algorithm 1), and the judge
reads what the policy then answers (Zhao et al. 2025, arXiv:2510.21184, section 4.3). Rewards are kept as they are; what counts
as a success is decided afterwards, by any threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core import Evaluator, options_under
from rlhf_eval_gcg.evaluation.options import GCGOptions

if TYPE_CHECKING:
    from rlhf_core import OpenContext
    from rlhf_eval_gcg.evaluation.engine import GCGEngine

__all__ = ["GCG"]


@dataclass(frozen=True)
class GCG(GCGOptions, Evaluator):
    """Attack the policy with suffixes that make targets likely, sample its answers, and judge them.

    Everything is kept in OUTPUT/gcg/step-N. Every goal and seed is attacked alone unless `transfer`: its suffix does not
    depend on other goals. Ranks share the attacks.
    """

    writes: ClassVar[tuple[str, ...]] = ("gcg/",)
    """the folder of all that is kept"""

    def check(self) -> None:
        """Read the goals and make the judge: what is wrong with them is raised before a model is loaded."""
        self.read()
        judge = self.make_judge()
        if judge is not None:
            with options_under("judge"):
                judge.check()

    def open(self, context: OpenContext) -> GCGEngine:
        """Open the judge. Models for `draft` and `more_models` are loaded when the first attack begins."""
        from rlhf_eval_gcg.evaluation.engine import GCGEngine

        return GCGEngine(self, context)
