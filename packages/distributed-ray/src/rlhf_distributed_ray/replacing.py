"""Rollout engines that are replaced when they die: a new actor in the same seat, with the weights and the state of the old one.

Engines do not depend on each other, so the others continue, and only the calls that were not answered are made again.
Sampling is seeded per completion: the new engine draws what the old one would have drawn.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.errors import RunStopped, WorkerLost
from rlhf_core.util.messages import log
from rlhf_distributed_ray.crew import Crew
from rlhf_distributed_ray.sending import WEIGHTS, Shipment

__all__ = ["EngineCrew"]

Call = Callable[[Any, int], Any]
ATTEMPTS = 5
"""Number of starts of a new engine before its death counts: Ray takes some seconds to notice that a node is gone."""


@dataclass(frozen=True)
class Weights:
    """The weights of a role, as they were sent last."""

    version: int
    sync: int
    buckets: list[Any]
    """references"""
    group: str | None
    """concurrency group in which engines receive them"""

    def receive(self, role: str, number: int) -> Call:
        """Return the call that gives an engine one bucket."""
        return lambda actor, _: actor.receive.options(concurrency_group=self.group).remote(
            role, self.sync, number, self.buckets[number]
        )

    def finish(self, role: str) -> Call:
        """Return the call that lets an engine take the buckets that it has received."""
        return lambda actor, _: actor.finish_sync.options(concurrency_group=self.group).remote(
            role, self.version, self.sync, len(self.buckets)
        )


class EngineCrew:
    """The actors of the rollout engines; a call on them survives the death of some.

    Args:
        crew: the actors.
        hire: returns a new actor in the seat of that number.
        retries: how many deaths the run survives.
        midway: engines take weights in the middle of a call.
    """

    def __init__(self, crew: Crew, hire: Callable[[int], Any], retries: int, midway: bool = False) -> None:
        self.crew = crew
        self._hire, self._left = hire, retries
        self._group = WEIGHTS if midway else None
        self._weights: dict[str, Weights] = {}
        """the last ones of each role"""
        self._syncs = 0
        self._states: dict[int, Mapping[str, Any]] = {}
        """the states that are known of engines that have one"""
        self._replaced, self._seconds = 0, 0.0
        self._counting = threading.Lock()
        self._seats = threading.RLock()
        """held while an engine is replaced and while weights are sent, so that no call begins and no engine starts without
        them; with `--ahead` one thread samples while another asks for states or brings weights"""

    def __len__(self) -> int:
        return len(self.crew)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every engine at once; results in their order."""
        found = self.ask(lambda actor, _: getattr(actor, method).remote(*args), range(len(self.crew)))
        return [found[rank] for rank in sorted(found)]

    def ask(self, call: Call, ranks: Iterable[int]) -> dict[int, Any]:
        """Make a call on each of these engines, again where one died; results by number.

        Raises:
            RunStopped: an engine died, and the run has survived as many deaths as it may.
            RlhfError: as raised in an engine.
        """
        results: dict[int, Any] = {}
        missing = list(ranks)
        while missing:
            with self._seats:
                asked = {rank: self.crew.actors[rank] for rank in missing}
                references = {rank: call(actor, rank) for rank, actor in asked.items()}
            found = self.crew.wait(references, grace=math.inf, asked=asked)
            if found.errors:
                found.deaths.clear()
                found.in_order()
            results |= found.results
            missing = sorted(found.deaths)
            for rank in missing:
                with self._seats:
                    if self.crew.actors[rank] is asked[rank]:  # else another thread has replaced it
                        self._replace(rank, found.deaths[rank])
        return results

    def bring_weights(
        self, role: str, version: int, send: Callable[[list[Any], int], Shipment]
    ) -> dict[int, Mapping[str, float]]:
        """Let every engine take a role's weights; return what each reports of it, by number.

        The references of buckets are kept until the next weights, for an engine that has to be replaced.

        Args:
            role: name of the role.
            version: of its weights.
            send: sends the weights to these actors, as sync of that number.
        """
        self._syncs += 1
        with self._seats:
            self._weights.pop(role, None)  # the controller need not hold two copies
            shipment = send(list(self.crew.actors), self._syncs)
            self._weights[role] = weights = Weights(version, self._syncs, shipment.buckets, self._group)
        for rank in shipment.late:  # it is asked by the controller, who finds out if it is dead
            for number in range(len(weights.buckets)):
                self.ask(weights.receive(role, number), [rank])
        return self.ask(weights.finish(role), range(len(self.crew)))

    def buckets(self, role: str) -> int:
        """Return how many buckets the last weights of a role were."""
        return len(self._weights[role].buckets)

    def remember(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep the states of engines, which those that replace them continue from."""
        self._states = dict(states)

    def forget_weights(self) -> None:
        """Drop the weights that are kept; all engines are about to get others."""
        self._weights.clear()

    def recoveries(self) -> dict[str, float]:
        """Return how many engines were replaced since the last question, and the seconds that it took."""
        with self._counting:
            metrics = {"recovered/engine": float(self._replaced), "recovered/engine_seconds": self._seconds}
            self._replaced, self._seconds = 0, 0.0
        return metrics

    def _replace(self, rank: int, death: WorkerLost) -> None:
        """Put a new engine in the place of a dead one.

        Raises:
            RunStopped: there were too many deaths. It is no `WorkerLost`: roles that start again bring no engine back.
            WorkerLost: the weights that the new engine would take are lost too.
        """
        began = time.monotonic()
        if not self._left:
            raise RunStopped(str(death)) from death
        self._left -= 1
        log.warning(f"{death.report}; a new engine replaces it")
        replaced = False
        try:
            for left in reversed(range(ATTEMPTS)):
                try:
                    self.crew.replace(rank, self._hire(rank))
                    self._equip(rank, death)
                    break
                except WorkerLost as again:
                    # one that is there without weights gets those of the run's next life, and is not replaced again
                    replaced = again.who != death.who
                    if replaced or not left:
                        raise
            replaced = True
        finally:
            with self._counting:
                self._replaced += replaced
                self._seconds += time.monotonic() - began

    def _equip(self, rank: int, death: WorkerLost) -> None:
        """Give a new engine the state and the weights of the old one."""
        import ray

        try:
            if self._states.get(rank):
                self._ask_one(rank, lambda actor, _: actor.load_state_dict.remote(self._states[rank]))
            for role, weights in self._weights.items():
                for number in range(len(weights.buckets)):
                    self._ask_one(rank, weights.receive(role, number))
                self._ask_one(rank, weights.finish(role))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.ObjectLostError):  # their owner is dead too
                raise WorkerLost(self.crew.who, f"{death.report}; its weights are lost") from None
            raise

    def _ask_one(self, rank: int, call: Call) -> Any:
        return self.crew.send(call, [rank]).in_order()[0]
