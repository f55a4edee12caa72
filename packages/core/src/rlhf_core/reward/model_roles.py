"""`--reward model_roles`: several trained reward models, each a role of the run; their scores are weighted and added up.

Each model has its own options, workers and strategy, and reads texts with its own tokenizer. Models whose devices differ score
at once. Weighted sums of such scores are those of Llama 2 (arXiv 2307.09288, section 3.4.3: helpfulness and safety) in their
simplest form; what a threshold decides there is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch, Rollouts
    from rlhf_core.contract.run_view import RowEncoder

__all__ = ["RewardModelRoles"]


@dataclass(frozen=True)
class RewardModelRoles(Reward):
    """The weighted sum of the scores of the roles `reward_model` and `reward_model_2`, each logged under its name.

    A class with other `roles`, of any number, and the `needs` that follow from them has everything else from this one.
    """

    roles: ClassVar[Mapping[str, ModelOptions]] = {"reward_model": ModelOptions(), "reward_model_2": ModelOptions()}
    needs: ClassVar[frozenset[str]] = frozenset({"reward_model.scores_N", "reward_model_2.scores_N"})
    reads_texts: ClassVar[bool] = True

    weights: tuple[float, ...] = ()
    """weights of the scores, in the order of the roles; all 1 by default"""

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.roles):
            raise OptionError(
                "weights", f"has {len(self.weights)} numbers for the {len(self.roles)} roles {', '.join(self.roles)}"
            )

    def role_rows(self, role: str, rollouts: Batch, encoder: RowEncoder) -> Batch:
        rows = [Example(meta["prompt"], (text,)) for meta, text in zip(rollouts.meta, rollouts.texts, strict=True)]
        return encoder.batch(rows, range(len(rows)))

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        scores = {role: rollouts[f"{role}.scores_N"] for role in self.roles}
        weights = self.weights or (1.0,) * len(scores)
        weighted = [weight * scores_N for weight, scores_N in zip(weights, scores.values(), strict=True)]
        return RewardOutput(rewards_N=sum(weighted[1:], weighted[0]), metrics=scores)
