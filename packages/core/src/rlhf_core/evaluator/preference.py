"""Measure how often a model prefers the chosen completion of a held-out pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.providers import Evaluator
from rlhf_core.contract.requirements import TRAINED
from rlhf_core.errors import UsageError
from rlhf_core.evaluator.heldout_samples import by_datasource, mean_and_error
from rlhf_core.training.rounding import prefer_chosen

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.run_view import RunView

__all__ = ["Preference"]

NEEDS = {
    "scores": frozenset({f"{TRAINED}.scores_N"}),
    "implicit": frozenset({f"{TRAINED}.logprobs_NT", "ref_logprobs_NT"}),
    "likelihood": frozenset({f"{TRAINED}.logprobs_NT"}),
}


@dataclass(frozen=True)
class Preference(Evaluator):
    """Pair accuracy on held-out preferences: of a reward model's scores, or of DPO's implicit rewards."""

    by: Literal["scores", "implicit", "likelihood"] = "implicit"
    """score of a completion: a reward model's; log pi - log ref, summed (Rafailov et al. 2023, eq. 5 up to beta); or
    log pi alone"""
    pairs: int = 256
    """maximum number of held-out pairs, taken from the first"""

    samples: ClassVar[bool] = False
    """nothing is sampled"""

    @property
    def needs(self) -> frozenset[str]:
        """The roles' outputs that are compared."""
        return NEEDS[self.by]

    def __call__(self, run: RunView) -> dict[str, float]:
        """`preference/accuracy` (a tie counts half), `…_se`, `…/<datasource>`, and `preference/margin`."""
        rows = run.heldout(self.pairs)
        if any(len(row.completions) != 2 for row in rows):
            raise UsageError("evaluator preference needs held-out rows with a chosen and a rejected completion")
        mine = list(range(run.world.rank, len(rows), run.world.size))
        batch = run.encoder.batch([rows[i] for i in mine], mine)
        values_N = self._values(run, batch).double()
        margins_P = values_N[0::2] - values_N[1::2]
        right_P = prefer_chosen(values_N[0::2], values_N[1::2])
        gathered = run.world.gather((margins_P.tolist(), right_P.tolist(), batch.meta[::2]))
        margins = [margin for part, _, _ in gathered for margin in part]
        right = [each for _, part, _ in gathered for each in part]
        meta = [each for _, _, part in gathered for each in part]
        return {
            **by_datasource("preference/accuracy", right, meta),
            "preference/margin": mean_and_error(margins)[0],
        }

    def _values(self, run: RunView, batch: Batch) -> Tensor:
        """Return the value of each completion that is compared."""
        name = run.plan.trained_roles[0] if run.plan.trained_roles else next(iter(run.plan.roles))
        if self.by == "scores":
            return run.roles[name].infer(batch, frozenset({"scores_N"}))["scores_N"]

        def likelihood(role: Any) -> Tensor:
            total_N: Tensor = (role.infer(batch, frozenset({"logprobs_NT"}))["logprobs_NT"] * batch.mask_NT).sum(1)
            return total_N

        own_N = likelihood(run.roles[name])
        return own_N - likelihood(run.roles["reference"]) if self.by == "implicit" else own_N
