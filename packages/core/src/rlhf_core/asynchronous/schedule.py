"""Record which weights sampled each call in OUTPUT/iterations.jsonl, and replay such a record.

A line per step:

    {"step": 7, "after": [5, 6], "versions": {"actor": {"5": 310, "6": 42}}, "uids": {"actor": [96]}, "trained": {"actor": 6}}

`after` holds the number of steps that had been trained, for each call of the rollout engines; `versions` counts sampled tokens
by the version of the weights; `trained` holds the versions that the step's updates began with. A replay holds each call back
until the engines have the recorded weights, and newer weights until all calls of older ones are made. Completions follow from
weights and seeds, so that a replayed run repeats the numbers of the recorded one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch

__all__ = ["FILE", "Schedule", "describe_batches", "read_schedule"]

FILE = "iterations.jsonl"
VERSIONS = "versions_NT"


class Schedule:
    """Calls of the rollout engines in order; beyond the recorded ones everything may be done at once.

    Args:
        calls: (step, steps trained before the call) of each.
    """

    def __init__(self, calls: Iterable[tuple[int, int]] = ()) -> None:
        self._calls = list(calls)
        self._made = 0

    @property
    def next_call(self) -> tuple[int, int] | None:
        """(step, steps trained before it) of the call that is due; None beyond the recorded ones."""
        return self._calls[self._made] if self._made < len(self._calls) else None

    def may_begin(self, step: int, trained: int) -> bool:
        """Return True if the first call of `step` is due once the engines have the weights after `trained` steps."""
        due = self.next_call
        return due is None or due[0] > step or due[1] <= trained

    def may_call(self, trained: int) -> bool:
        """Return True if the next call is to be made with the weights after `trained` steps."""
        due = self.next_call
        return due is None or due[1] <= trained

    def may_bring(self, trained: int) -> bool:
        """Return True if all calls with older weights than those after `trained` steps are made."""
        due = self.next_call
        return due is None or due[1] >= trained

    def add_call(self, step: int) -> None:
        """Take in that a call of `step` is made. Calls of earlier steps that were recorded will not come any more."""
        while self.next_call is not None and self.next_call[0] < step:
            self._made += 1
        if self.next_call is not None and self.next_call[0] == step:
            self._made += 1

    def begin_after(self, step: int) -> None:
        """Leave out the calls of the steps up to `step`, which a resumed run has behind it."""
        self._calls = [call for call in self._calls if call[0] > step]


def read_schedule(path: str) -> Schedule:
    """Return the recorded schedule; without a path an empty one.

    Raises:
        OptionError: the file is missing or holds something else.
    """
    if not path:
        return Schedule()
    try:
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        return Schedule((int(row["step"]), int(after)) for row in rows for after in row["after"])
    except OSError as error:
        raise OptionError("/replay", f"{path}: {error.strerror}; name the {FILE} of a run that sampled ahead") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError("/replay", f"{path} is not an {FILE} of a run ({type(error).__name__}: {error})") from None


def describe_batches(batches: Mapping[str, Batch], trained: Mapping[str, int]) -> dict[str, Any]:
    """Return the record of the sampled batches of a step: uids, tokens by version, and versions in training."""
    sampled = {name: batch for name, batch in batches.items() if VERSIONS in batch}
    return {
        "versions": {name: _tokens_by_version(batch) for name, batch in sampled.items()},
        "uids": {name: list(dict.fromkeys(batch["uids_N"].tolist())) for name, batch in sampled.items()},
        "trained": {name: trained[name] for name in sampled if name in trained},
    }


def _tokens_by_version(batch: Batch) -> dict[str, int]:
    versions, counts = batch[VERSIONS][batch.mask_NT].unique(return_counts=True)
    pairs: Sequence[tuple[int, int]] = list(zip(versions.tolist(), counts.tolist(), strict=True))
    return {str(version): count for version, count in pairs}
