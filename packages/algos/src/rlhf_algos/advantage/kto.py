"""The sign and the reference point of each completion, the credit of KTO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rlhf_algos.pairs import sequence_logprobs
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.distributed import World
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit
from rlhf_core.errors import UsageError, advice, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.results import RewardOutput

__all__ = ["KTOAdvantage", "add_mismatched_rows"]

MISMATCHED = "mismatched_N"
"""1 for rows that are there for the reference point alone."""


@dataclass(frozen=True)
class KTOAdvantage(Advantage):
    """Positive credit for desirable rows, negative for undesirable ones, and the reference point z (Ethayarajh et al. 2024).

    Reads the data's label: true or a positive number is desirable; of pairs the chosen one is, and the rejected one is not.
    z is what log(pi / ref) of a completion is to be expected to be, never below 0; its mean is over all ranks.
    """

    desirable: float = 1.0
    """weight of desirable rows"""
    undesirable: float = 1.0
    """weight of undesirable rows; weight times number of rows should be about equal for both kinds"""
    z: Literal["mismatched", "other", "batch", "zero"] = "mismatched"
    """mean log(pi / ref) of completions under the next row's prompt (the paper; twice the forward passes), of the other kind's
    rows (its form for pairs), of all rows, or no reference point"""

    @property
    def needs(self) -> frozenset[str]:
        asked = frozenset({"actor.logprobs_NT", "ref_logprobs_NT"})
        return asked | {MISMATCHED} if self.z == "mismatched" else asked

    def __post_init__(self) -> None:
        check_ranges(self, desirable="(0, inf)", undesirable="(0, inf)")

    def prepare(self, batch: Batch) -> Batch:
        """The batch, followed by its prompts with one another's completions where z is estimated on those."""
        if self.z != "mismatched":
            return batch
        N = torch.ones(len(batch))
        return Batch.cat(
            [batch.with_extras(**{MISMATCHED: 0 * N}), add_mismatched_rows(batch).with_extras(**{MISMATCHED: N})]
        )

    def __call__(self, rewards: RewardOutput, rollouts: Batch, extras: Mapping[str, Tensor]) -> Credit:
        ratios_N = sequence_logprobs(extras["actor.logprobs_NT"] - extras["ref_logprobs_NT"], rollouts.mask_NT).double()
        strange_N = extras[MISMATCHED] > 0.5 if self.z == "mismatched" else torch.zeros(len(rollouts), dtype=torch.bool)
        desirable_N = _desirable_mask(rollouts)
        kinds = (desirable_N & ~strange_N, ~desirable_N & ~strange_N, strange_N)
        sums = torch.stack([value for kind_N in kinds for value in (ratios_N[kind_N].sum(), kind_N.sum().double())])
        summed = (rollouts.world.sum(sums) if rollouts.world is not None else sums).tolist()
        good_sum, good, bad_sum, bad, strange_sum, strange = summed
        if not (good and bad) and rollouts.step.progress == 0.0:
            kind = "desirable" if good else "undesirable"
            raise UsageError(
                f"KTO needs desirable and undesirable rows, but the first batch has only {kind} ones: check the "
                f"labels{advice(' (' + run_option('data.label_key') + ')')}, true or false, or raise "
                f"{run_option('batch_size')}"
            )
        points = {
            "mismatched": (strange_sum / max(strange, 1),) * 2,
            "other": (bad_sum / max(bad, 1), good_sum / max(good, 1)),
            "batch": ((good_sum + bad_sum) / max(good + bad, 1),) * 2,
            "zero": (0.0, 0.0),
        }
        z_good, z_bad = (max(0.0, point) for point in points[self.z])
        weights_N = torch.where(desirable_N, self.desirable, -self.undesirable)
        z_N = torch.where(desirable_N, z_good, z_bad)
        mask_NT = rollouts.mask_NT & ~strange_N[:, None]
        rows = (~strange_N).nonzero().flatten() if strange else None
        metrics = {"kto/desirable": good / (good + bad), "kto/z": (good * z_good + bad * z_bad) / (good + bad)}
        return Credit(weights_N[:, None] * mask_NT, z_N[:, None] * mask_NT, rows, metrics)


def add_mismatched_rows(batch: Batch) -> Batch:
    """Every prompt with the completion of the row after it, or of the pair after it; the last one with the first rank's.

    Completions are cut where prompt and completion would be longer than any row of the batch.

    Raises:
        UsageError: there is no other prompt.
    """
    world = batch.world or World()
    unit = 2 if any(world.gather(len(batch) > 0 and _is_paired(batch))) else 1
    firsts = world.gather((len(batch), replace(batch.rows(range(min(unit, len(batch)))), world=None)))
    if sum(rows for rows, _ in firsts) <= unit:
        raise UsageError(
            "KTO pairs completions with other prompts, but the batch has only one prompt; raise "
            f"{run_option('batch_size')}"
        )
    longest = int((batch.prompt_lengths_N + batch.lengths_N).max()) if len(batch) else 0
    room = max(world.gather(longest))
    if not len(batch):  # fewer rows than ranks
        return batch
    following = firsts[world.rank + 1 :] + firsts[: world.rank + 1]
    others = Batch.cat([batch, next(first for rows, first in following if rows)]).rows(range(unit, unit + len(batch)))
    lengths_N = torch.minimum(others.lengths_N, (room - batch.prompt_lengths_N).clamp(min=1))
    return replace(
        batch,
        texts=others.texts,
        tokens_NT=others.tokens_NT,
        lengths_N=lengths_N,
        mask_NT=others.mask_NT & (torch.arange(others.mask_NT.shape[1]) < lengths_N[:, None]),
    )


def _is_paired(batch: Batch) -> bool:
    """Return True if rows alternate between chosen and rejected completions."""
    return len(batch) % 2 == 0 and torch.equal(batch.group_N[0::2], batch.group_N[1::2])


def _desirable_mask(rollouts: Batch) -> Tensor:
    """Mark the desirable rows (N,): by their labels, or by their position in a pair."""
    if any(label is not None for label in rollouts.labels) or not _is_paired(rollouts):
        return torch.tensor([_is_desirable(label) for label in rollouts.labels])
    return torch.arange(len(rollouts)) % 2 == 0


def _is_desirable(label: object) -> bool:
    """The label of a row as a judgment."""
    if isinstance(label, (bool, int, float)):
        return label > 0
    raise UsageError(
        f"KTO needs pairs, or labels that are true, false or a number (positive means desirable), not {label!r}"
    )
