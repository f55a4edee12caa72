"""The actors of one role, or the rollout engines: how they are called, waited for, and found dead or hung.

No call is waited for without an end. An actor that gives no sign of life, or makes no progress, is killed, and is then as
dead as one that crashed. Whoever died is named.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.errors import NotFinite, RlhfError, WorkerLost, run_option
from rlhf_distributed_ray.pulse import Limits, Pulse

__all__ = ["Crew", "Outcomes"]

CAUSE = 240  # characters of what Ray says
GRACE_SECONDS = 5.0
"""What other ranks have to fail too, once one did."""


@dataclass
class Outcomes:
    """What became of a call on several actors, by rank; a rank that was no longer waited for is in neither."""

    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    """what was raised in the actor"""
    deaths: dict[int, WorkerLost] = field(default_factory=dict)

    def in_order(self) -> list[Any]:
        """Return the results, of all ranks.

        Raises:
            WorkerLost: an actor died. Others may fail of it, since their connection is closed, so a death counts most.
            RlhfError: as raised in the actor.
        """
        for _, death in sorted(self.deaths.items()):
            raise death from None
        causes = [getattr(error, "cause", None) for error in self.errors.values()]
        unfit = [cause for cause in causes if isinstance(cause, NotFinite)]
        if unfit:  # of every rank, each with the samples that it knows of
            unfit[0].samples = [sample for cause in unfit for sample in cause.samples]
            raise unfit[0]
        for error, cause in zip(self.errors.values(), causes, strict=True):
            raise cause if isinstance(cause, RlhfError) else error
        return [result for _, result in sorted(self.results.items())]


class Crew:
    """Actors that are called together.

    Args:
        who: the name of all of them, for messages: `role actor`, `rollout engine`.
        actors: one per rank.
        limits: how long a silent one is waited for.
    """

    def __init__(self, who: str, actors: Sequence[Any], limits: Limits) -> None:
        self.who, self.limits = who, limits
        self.actors = list(actors)
        self.where: list[tuple[str, int]] = []
        """host name and process id of each, once it has told them"""
        self._pulses = [Pulse(limits) for _ in self.actors]
        self._longest = 0.0
        """seconds of the longest call so far"""
        self._sending = threading.Lock()
        """of several threads, one sends to all ranks at a time: ranks work together and need calls in one order"""

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every rank at once; results in rank order."""
        return self.send(lambda actor, _: getattr(actor, method).remote(*args)).in_order()

    def send(self, call: Callable[[Any, int], Any], ranks: Sequence[int] | None = None) -> Outcomes:
        """Make a call on each of `ranks` (all of them by default) by `call(actor, rank)`, and wait for the ends.

        A failure ends the waiting: ranks that wait for a dead one would do so forever. The rest have some seconds to say what
        happened.
        """
        with self._sending:
            references = {
                rank: call(self.actors[rank], rank) for rank in (range(len(self.actors)) if ranks is None else ranks)
            }
        return self.wait(references)

    def wait(self, references: Mapping[int, Any], grace: float = GRACE_SECONDS) -> Outcomes:
        """Wait for calls by rank; once one failed, at most `grace` seconds for each of the others."""
        import ray

        rank_of = {reference: rank for rank, reference in references.items()}
        outcomes, hung = Outcomes(), dict[int, str]()
        for rank in references:
            self._pulses[rank].begin()
        pending, began = list(rank_of), time.monotonic()
        while pending:
            failed = bool(outcomes.errors or outcomes.deaths)
            seconds = grace if failed else self.limits.interval
            done, pending = ray.wait(pending, num_returns=1, timeout=seconds)
            if not done:
                if failed:
                    break
                hung |= self._kill_hung(rank for rank in map(rank_of.__getitem__, pending) if rank not in hung)
                continue
            rank = rank_of[done[0]]
            try:
                outcomes.results[rank] = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                outcomes.errors[rank] = error
            except ray.exceptions.RayError as error:  # no error of the code: its process is gone
                outcomes.deaths[rank] = self._describe(rank, hung.get(rank) or _cause(error))
        if not (outcomes.errors or outcomes.deaths):
            self._longest = max(self._longest, time.monotonic() - began)
        return outcomes

    def _kill_hung(self, ranks: Any) -> dict[int, str]:
        """Kill those of `ranks` that hang; return why, by rank."""
        import ray

        hung = {}
        for rank in ranks:
            why = self._pulses[rank].look(self.actors[rank], self._longest)
            if why:
                hung[rank] = why
                ray.kill(self.actors[rank])
        return hung

    def _describe(self, rank: int, cause: str) -> WorkerLost:
        """Return what is raised for a dead actor."""
        node, process = self.where[rank] if rank < len(self.where) else ("an unknown node", 0)
        return WorkerLost(
            f"{self.who} rank {rank}",
            f"{self.who} rank {rank} on node {node} (process {process}) died: {cause}; continue from the last checkpoint "
            f"with {run_option('resume', True)}",
        )


def _cause(error: Exception) -> str:
    """Return the line of Ray's report that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no cause given"]
    memory = next((line for line in lines if "memory" in line), lines[-1])  # Ray kills workers before the system does
    return memory if len(memory) <= CAUSE else f"{memory[:CAUSE]} …"
