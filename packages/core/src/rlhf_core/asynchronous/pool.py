"""Groups in progress over several iterations: which of them an iteration trains on, and which it must wait for.

An iteration ends as soon as enough groups are complete. Others continue under the next weights and are trained on
later: a slow completion delays no others, and surplus groups are not wasted. A group that would be too old in the next
    one is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["GroupPool"]


class InProgress(Protocol):
    """A group of completions of a prompt."""

    begun: int | None
    """steps that had been trained when its sampling began; None before"""

    @property
    def is_complete(self) -> bool:
        """True if it is complete."""
        ...


Group = TypeVar("Group", bound=InProgress)


class GroupPool(Generic[Group]):
    """The groups that are drawn and not trained on, oldest first.

    Args:
        batch: groups that an iteration trains on.
        surplus: groups in progress beyond these, 0 to `batch`.
        most: steps that may be trained between the first token of a group and the step that trains on it.
    """

    def __init__(self, batch: int, surplus: int, most: int) -> None:
        assert 0 <= surplus <= batch, "or more groups could become too old at once than an iteration takes"
        self.batch, self.surplus, self.most = batch, surplus, most
        self.groups: list[Group] = []

    @property
    def lacking(self) -> int:
        """The number of groups that are to be added."""
        return max(0, self.batch + self.surplus - len(self.groups))

    def is_due(self, group: Group, step: int) -> bool:
        """Return True if the group would be too old in the step after `step`."""
        return group.begun is not None and step - group.begun > self.most

    def enough(self, step: int, few: bool = False) -> bool:
        """Return True if the iteration of `step` can end; with `few`, it may have fewer groups than it should."""
        complete = [group for group in self.groups if group.is_complete]
        if not all(group.is_complete for group in self.groups if self.is_due(group, step)):
            return False
        return len(complete) >= (1 if few else self.batch)

    def take(self, step: int) -> Sequence[Group]:
        """Return the complete groups that `step` trains on, oldest first, and keep the others."""
        complete = [group for group in self.groups if group.is_complete]
        taken = complete[: self.batch]
        left = [group for group in complete[self.batch :] if self.is_due(group, step)]
        assert not left, f"{len(left)} groups are too old for the step after {step}"
        self.groups = [group for group in self.groups if not any(group is each for each in taken)]
        return taken
