"""The actors of one role, or the rollout engines: how they are called, waited for, and found dead or hung.

No call is waited for without an end. An actor that gives no sign of life, or makes no progress, is killed, and is then as
dead as one that crashed. Whoever died is named.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.errors import NotFinite, RlhfError, WorkerLost
from rlhf_distributed_ray.pulse import GROUP, Limits, Pulse

__all__ = ["Crew", "Outcomes"]

CAUSE = 240  # characters of Ray's message
ADVICE = " Some common causes include"
"""Text that Ray adds to every death."""
GRACE_SECONDS = 5.0
"""Seconds that other ranks have to fail too, once one did."""


@dataclass
class Outcomes:
    """Results and errors of a call on several actors, by rank; a rank whose result is not awaited is in neither."""

    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    """exceptions that were raised in the actor"""
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
        """host name and process id of each, once they are known"""
        self._pulses = [Pulse(limits) for _ in self.actors]
        self._longest = 0.0
        """seconds of the longest call so far"""
        self._sending = threading.Lock()
        """lock: one thread at a time sends to all ranks, since ranks work together and need calls in one order"""

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every rank at once; results in rank order."""
        return self.send(lambda actor, _: getattr(actor, method).remote(*args)).in_order()

    def is_whole(self) -> bool:
        """Return True if every actor gives a sign of life."""
        import ray

        asked = [actor.beat.options(concurrency_group=GROUP).remote() for actor in self.actors]
        done, silent = ray.wait(asked, num_returns=len(asked), timeout=self.limits.patience)
        try:
            ray.get(done)
        except ray.exceptions.RayError:
            return False
        return not silent

    def replace(self, rank: int, actor: Any) -> None:
        """Put a new actor, which has not built its plan yet, in the place of a dead one."""
        self.actors[rank] = actor
        self._pulses[rank] = Pulse(self.limits)
        (self.where[rank],) = self.send(lambda new, _: new.initialize.remote(), [rank]).in_order()

    def send(
        self, call: Callable[[Any, int], Any], ranks: Sequence[int] | None = None, grace: float = GRACE_SECONDS
    ) -> Outcomes:
        """Make a call on each of `ranks` (all of them by default) by `call(actor, rank)`, and wait for the ends.

        A failure ends the waiting, unless `grace` is infinite: ranks that wait for a dead one would do so forever. The rest
        have this many seconds to report what happened.
        """
        with self._sending:
            references = {
                rank: call(self.actors[rank], rank) for rank in (range(len(self.actors)) if ranks is None else ranks)
            }
        return self.wait(references, grace)

    def wait(
        self, references: Mapping[int, Any], grace: float = GRACE_SECONDS, asked: Mapping[int, Any] | None = None
    ) -> Outcomes:
        """Wait for calls by rank; once one failed, at most `grace` seconds for the others.

        `asked` are the actors that were called, if another thread may put new ones in their places meanwhile.
        """
        import ray

        asked = asked or {rank: self.actors[rank] for rank in references}
        pulses = {rank: self._pulses[rank] for rank in references}
        rank_of = {reference: rank for rank, reference in references.items()}
        outcomes, hung = Outcomes(), dict[int, str]()
        for pulse in pulses.values():
            pulse.begin()
        pending, began, ends = list(rank_of), time.monotonic(), math.inf
        while pending and time.monotonic() < ends:
            seconds = min(self.limits.interval, max(0.0, ends - time.monotonic()))
            done, pending = ray.wait(pending, num_returns=1, timeout=seconds)
            if not done:
                silent = [rank_of[each] for each in pending if rank_of[each] not in hung]
                hung |= self._kill_hung({rank: (asked[rank], pulses[rank]) for rank in silent})
                continue
            rank = rank_of[done[0]]
            try:
                outcomes.results[rank] = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                outcomes.errors[rank] = error
            except ray.exceptions.RayError as error:  # no error of the code: its process is gone
                if isinstance(error, ray.exceptions.ActorUnavailableError):
                    ray.kill(asked[rank])  # Ray would wait for it, and give its place to no other
                outcomes.deaths[rank] = self._describe(rank, hung.get(rank) or _cause(error))
            if rank in outcomes.results or rank in outcomes.errors:
                pulses[rank].end()
            if rank not in outcomes.results:
                ends = min(ends, time.monotonic() + grace)
        if not (outcomes.errors or outcomes.deaths):
            self._longest = max(self._longest, time.monotonic() - began)
        return outcomes

    def _kill_hung(self, silent: Mapping[int, tuple[Any, Pulse]]) -> dict[int, str]:
        """Kill those actors that hang; return why, by rank."""
        import ray

        hung = {}
        for rank, (actor, pulse) in silent.items():
            why = pulse.look(actor, self._longest)
            if why:
                hung[rank] = why
                ray.kill(actor)
        return hung

    def _describe(self, rank: int, cause: str) -> WorkerLost:
        """Return what is raised for a dead actor."""
        node, process = self.where[rank] if rank < len(self.where) else ("an unknown node", 0)
        who = f"{self.who} rank {rank}"
        return WorkerLost(who, f"{who} on node {node} (process {process}) died: {cause}")


def _cause(error: Exception) -> str:
    """Return the most informative line of Ray's report."""
    told = [line.strip().partition(ADVICE)[0] for line in str(error).splitlines()]
    lines = [line for line in told if line] or ["no cause given"]
    memory = next((line for line in lines if "memory" in line), lines[-1])  # Ray kills workers before the system does
    return memory if len(memory) <= CAUSE else f"{memory[:CAUSE]} …"
