"""The state of a long attack in a file, so that a killed one continues with the same suffixes.

The file is replaced as a whole, is read without executing anything in it, and belongs to one attack: goals, options, seed and
weights are compared before it is used.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.util.atomic_files import remove_leftovers, write_bytes
from rlhf_eval_gcg.attack.lane import Answers
from rlhf_eval_gcg.attack.search import Record, Search

if TYPE_CHECKING:
    from rlhf_eval_gcg.attack.goal import Goal
    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["StateFile", "fingerprint"]

FORMAT = 3
INTERVAL_S = 10.0
"""Seconds between two saves; the most that a kill costs, in addition to one step."""
NO_RESULT = frozenset({"batch_tokens", "goals_at_once"})
"""Options that change no suffix, so that a later call may choose another."""


def fingerprint(models: Sequence[Any], goals: Sequence[Goal], options: Attack, seed: int | Sequence[int]) -> str:
    """Return one word for everything that decides the suffixes of an attack."""
    digest = hashlib.blake2b(digest_size=16)
    chosen = {name: value for name, value in asdict(options).items() if name not in NO_RESULT}
    digest.update(
        repr(
            [
                FORMAT,
                seed if isinstance(seed, int) else list(seed),
                [asdict(goal) for goal in goals],
                sorted(chosen.items()),
            ]
        ).encode()
    )
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # their sums do not depend on the order
    for model in models:
        for name, weight in model.named_parameters():
            bits = weight.detach().contiguous().view(integers[weight.element_size()])
            digest.update(
                repr([name, tuple(weight.shape), str(weight.dtype), int(bits.sum(dtype=torch.int64))]).encode()
            )
    return digest.hexdigest()


class StateFile:
    """Reads and writes the state of searches.

    Args:
        path: the file.
        owner: the attack's fingerprint.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path, self.owner = path, owner
        self._written = time.monotonic()

    def load(self, searches: Sequence[Search]) -> None:
        """Restore searches from the file; do nothing without a file.

        Raises:
            UsageError: the file is damaged, or belongs to another attack.
        """
        remove_leftovers(self.path)
        if not self.path.exists():
            return
        try:
            content = torch.load(io.BytesIO(self.path.read_bytes()), map_location="cpu", weights_only=True)
            owner, states = content["owner"], content["searches"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"{self.path} is not the state of an attack ({said}); remove it to start over") from None
        if owner != self.owner:
            raise UsageError(
                f"{self.path} is the state of an attack with other goals, options, seed or weights; remove it to "
                "start over, or name another file"
            )
        for search, state in zip(searches, states, strict=True):
            _restore(search, state)

    def save(self, searches: Sequence[Search], force: bool = False) -> None:
        """Write the state, unless it was written a moment ago."""
        if not force and time.monotonic() - self._written < INTERVAL_S:
            return
        buffer = io.BytesIO()
        torch.save({"owner": self.owner, "searches": [_snapshot(search) for search in searches]}, buffer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, buffer.getvalue())
        self._written = time.monotonic()


def _snapshot(search: Search) -> dict[str, Any]:
    """Return the state of a search as plain values and tensors."""
    suffix = search.suffix
    return {
        "record": asdict(search.record),
        "opened": search.opened,
        "ids_L": suffix.ids_L.cpu(),
        "loss": float(suffix.loss),
        "memory": {name: value.cpu() for name, value in suffix.memory.items()},
        "generator": suffix.generator.get_state(),
        "answers": [
            {"ids": [ids.cpu() for ids in lane.answers.ids], "kind": lane.answers.kind, "weights": lane.answers.weights}
            for lane in search.lanes
        ],
        "bases": [None if lane.base_L is None else lane.base_L.cpu() for lane in search.lanes],
    }


def _restore(search: Search, state: dict[str, Any]) -> None:
    """Restore a search from a snapshot."""
    suffix = search.suffix
    device = suffix.ids_L.device
    search.record = Record(**{field.name: state["record"][field.name] for field in fields(Record)})
    search.opened = state["opened"]
    suffix.ids_L, suffix.loss = state["ids_L"].to(device), state["loss"]
    suffix.memory = {name: value.to(device) for name, value in state["memory"].items()}
    suffix.generator.set_state(state["generator"])
    for lane, answers, base_L in zip(search.lanes, state["answers"], state["bases"], strict=True):
        lane.base_L = None if base_L is None else base_L.to(lane.victim.device)
        ids = tuple(each.to(lane.victim.device) for each in answers["ids"])
        lane.answers = Answers(ids, answers["kind"], answers["weights"])
