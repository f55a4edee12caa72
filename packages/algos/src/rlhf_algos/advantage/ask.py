"""The pairs of a batch that are worth a label, as credit: the active setting of one-pass reward modeling."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_algos.pairs import split_pairs
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.distributed import World
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from rlhf_algos.one_pass.curvature import Dense
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.results import RewardOutput

__all__ = ["AskAdvantage", "AskEngine"]


@dataclass(frozen=True)
class AskAdvantage(Advantage):
    """Selects the pairs of each batch whose labels teach the most; the others are not trained on (arXiv 2502.07193, algorithm
    3).

    The choice does not look at labels, and is made over the whole batch of all ranks. The curvature of `uncertainty` is that
    of the pairs that were asked, each at the reward of its time; it is part of checkpoints. Held-out pairs are all kept.
    """

    by: Literal["uncertainty", "reward_diff", "margin", "closest", "distance", "random", "drts", "delta_ucb"] = (
        "uncertainty"
    )
    """largest norm of the feature difference in the inverse curvature; largest predicted difference of rewards; difference
    nearest to 1; nearest to 0; largest distance of features; chance; or the largest difference of a posterior draw (DRTS), or
    one standard deviation above the prediction (DeltaUCB), arXiv 2603.09692"""
    share: float = 0.25
    """share of each batch that is asked, at least one pair"""
    damping: float = 1.0
    """curvature before any pair, in units of squared feature differences, above 0"""
    seed: int = 0
    """seed of `random` and `drts`, together with the step"""

    needs: ClassVar[frozenset[str]] = frozenset({"reward.scores_N", "reward.features_NH"})
    selects: ClassVar[str] = "rows"
    """some of the rows, pairs of data that stay pairs"""

    def __post_init__(self) -> None:
        check_ranges(self, share="(0, 1]", damping="(0, inf)")

    def open(self, context: OpenContext) -> AskEngine:
        """Open a curvature of no pairs."""
        return AskEngine(self)


class AskEngine:
    """The curvature of the pairs asked so far.

    Args:
        options: those of the advantage.
    """

    def __init__(self, options: AskAdvantage) -> None:
        self.options = options
        self.labels = 0
        self._curvature: Dense | None = None

    def __call__(self, rewards: RewardOutput, rollouts: Any, extras: Mapping[str, Tensor]) -> Credit:
        chosen, rejected = split_pairs(extras["reward.scores_N"].double(), rollouts)
        z_BD = extras["reward.features_NH"].double()
        z_BD = z_BD[0::2] - z_BD[1::2]
        sign_N = torch.tensor([1.0, -1.0]).repeat(len(chosen))
        advantages_NT = sign_N[:, None] * rollouts.mask_NT
        if rollouts.step.number == 0:  # an evaluation measures every pair
            return Credit(advantages_NT)
        mine_B, metrics = self._ask(chosen - rejected, z_BD, rollouts.world or World(), rollouts.step.number)
        rows = torch.stack([2 * mine_B, 2 * mine_B + 1], 1).flatten()
        return Credit(advantages_NT, rows=rows, metrics=metrics)

    def _ask(self, margins_B: Tensor, z_BD: Tensor, world: World, step: int) -> tuple[Tensor, dict[str, float]]:
        """The pairs of this rank that are asked, and metrics; the curvature takes in those of all ranks."""
        from rlhf_algos.one_pass.curvature import Dense
        from rlhf_algos.selection.queries import Queries, top_share

        parts = world.gather((margins_B.cpu(), z_BD.cpu()))
        margins_A, z_AD = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        if self._curvature is None:
            self._curvature = Dense.ridge(z_AD.shape[1], self.options.damping)
        scores_A = Queries(margins_A, z_AD, self._curvature, self._generator(step)).scores(self.options.by)
        asked = top_share(scores_A, self.options.share)
        p_A = torch.sigmoid(margins_A[asked])
        self._curvature = self._curvature.plus(z_AD[asked], p_A * (1 - p_A))
        self.labels += len(asked)
        first = sum(len(part[0]) for part in parts[: world.rank])
        mine = asked[(asked >= first) & (asked < first + len(margins_B))] - first
        return mine, {"ask/labels": float(self.labels), "ask/score": float(scores_A[asked].mean())}

    def _generator(self, step: int) -> Generator:
        digest = hashlib.sha256(f"{self.options.seed} {step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def state_dict(self) -> Mapping[str, Any]:
        curvature = {} if self._curvature is None else {"inverse_DD": self._curvature.inverse_DD}
        return {"labels": self.labels, **curvature}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from rlhf_algos.one_pass.curvature import Dense

        self.labels = int(state["labels"])
        self._curvature = Dense(state["inverse_DD"].clone()) if "inverse_DD" in state else None

    def close(self) -> None:
        """Nothing to do."""
