"""Dead rollout engines, one by one: each is replaced once and counted once, whatever else is lost with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")

from rlhf_core.errors import RunStopped, WorkerLost  # noqa: E402  after the check above
from rlhf_distributed_ray.crew import Outcomes  # noqa: E402
from rlhf_distributed_ray.replacing import ATTEMPTS, EngineCrew  # noqa: E402
from rlhf_distributed_ray.sending import Shipment  # noqa: E402


class Engine:
    """Engine that ignores its calls, or raises the exception of the test."""

    def __init__(self, dead: bool = False, weights_lost: bool = False) -> None:
        self.dead, self.weights_lost = dead, weights_lost
        self.dies: threading.Event | None = None
        """what it dies of, while its first call is waited for"""
        self.receive = self.finish_sync = SimpleNamespace(
            options=lambda concurrency_group: SimpleNamespace(remote=lambda *_: None)
        )


class Engines:
    """A crew in this process; a call returns the engine that answered."""

    who = "rollout engine"

    def __init__(self, *actors: Engine) -> None:
        self.actors = list(actors)

    def __len__(self) -> int:
        return len(self.actors)

    def replace(self, rank: int, actor: Engine) -> None:
        self.actors[rank] = actor
        if actor.dead:
            raise died(rank)

    def send(self, call: Callable[[Any, int], Any], ranks: Sequence[int]) -> Outcomes:
        return self.wait({rank: call(self.actors[rank], rank) for rank in ranks})

    def wait(
        self, references: Mapping[int, Any], grace: float = 0.0, asked: Mapping[int, Any] | None = None
    ) -> Outcomes:
        found = Outcomes()
        for rank, reference in references.items():
            if (dies := self.actors[rank].dies) is not None:
                self.actors[rank].dead = dies.wait(60)
            if self.actors[rank].dead:
                found.deaths[rank] = died(rank)
            elif self.actors[rank].weights_lost:
                lost = ray.exceptions.ObjectLostError("0" * 56, None, "")
                found.errors[rank] = ray.exceptions.RayTaskError("receive", "lost", lost)
            else:
                found.results[rank] = reference
        return found


def died(rank: int) -> WorkerLost:
    who = f"rollout engine rank {rank}"
    return WorkerLost(who, f"{who} on node here (process 7) died: for the test")


def answer(actor: Any, _: int) -> Any:
    return actor


def crew_of(hired: list[Engine], *actors: Engine, retries: int = 9) -> EngineCrew:
    crew: Any = Engines(*actors)
    return EngineCrew(crew, lambda _: hired.pop(0), retries)


def replaced(crew: EngineCrew) -> float:
    return crew.recoveries()["recovered/engine"]


def test_an_engine_that_starts_at_the_third_attempt_is_one_recovery() -> None:
    new = Engine()
    crew = crew_of([Engine(dead=True), Engine(dead=True), new], Engine(dead=True), Engine())
    assert crew.ask(answer, [0, 1])[0] is new
    assert replaced(crew) == 1 and replaced(crew) == 0, "what was told is not told again"


def test_an_engine_whose_weights_are_lost_with_their_sender_is_counted_though_the_step_is_given_up() -> None:
    """A node died with the worker that had sent the weights and with an engine. The engine has its place again."""
    new = Engine()
    crew = crew_of([new], Engine(), retries=1)
    crew.bring_weights("actor", 1, lambda *_: Shipment(["reference"], []))
    crew.crew.actors[0].dead, new.weights_lost = True, True
    with pytest.raises(WorkerLost, match="its weights are lost"):
        crew.ask(answer, [0])
    new.weights_lost = False
    crew.forget_weights()
    assert crew.ask(answer, [0]) == {0: new}
    assert replaced(crew) == 1


def test_an_engine_that_never_starts_is_no_recovery() -> None:
    crew = crew_of([Engine(dead=True) for _ in range(ATTEMPTS)], Engine(dead=True))
    with pytest.raises(WorkerLost, match="^rollout engine rank 0 on node here"):
        crew.ask(answer, [0])
    assert replaced(crew) == 0


def test_a_death_too_many_ends_the_run_at_once() -> None:
    """A `WorkerLost` would restart every role, up to `--launcher.retries` times, and find the engine as dead as before."""
    crew = crew_of([], Engine(dead=True), retries=0)
    with pytest.raises(
        RunStopped, match="^rollout engine rank 0 on node here .* continue from the last check"
    ) as caught:
        crew.ask(answer, [0])
    assert not isinstance(caught.value, WorkerLost)


def test_an_engine_that_dies_while_weights_are_sent_starts_with_them() -> None:
    """The thread that samples finds it dead in the middle of the sending, and replaces it only afterwards."""
    old, new, told, answers = Engine(), Engine(), list[str](), list[Any]()
    old.dies = threading.Event()

    def tell(what: str) -> SimpleNamespace:
        return SimpleNamespace(options=lambda concurrency_group: SimpleNamespace(remote=lambda *_: told.append(what)))

    new.receive, new.finish_sync = tell("bucket"), tell("finish")
    crew = crew_of([new], old)

    def sample(actor: Any, _: int) -> Any:
        told.append("new" if actor is new else "old")
        begun.set()
        return actor

    def send(actors: list[Any], sync: int) -> Shipment:
        assert old.dies is not None
        old.dies.set()
        thread.join(0.5)  # it has that long to do the wrong thing
        told.append("sent")
        return Shipment(["reference"], [])

    begun = threading.Event()
    thread = threading.Thread(target=lambda: answers.append(crew.ask(sample, [0])[0]))
    thread.start()
    assert begun.wait(60)
    crew.bring_weights("actor", 1, send)
    thread.join(60)
    assert answers == [new] and replaced(crew) == 1
    assert told[:4] == ["old", "sent", "bucket", "finish"] and "new" in told[4:], told


def test_two_threads_that_find_the_same_engine_dead_replace_it_once() -> None:
    """One samples while another asks for states, which begins while the new engine starts."""
    hired, threads, answers = [Engine(), Engine()], list[threading.Thread](), list[Any]()

    def hire(_: int) -> Engine:
        if not threads:
            threads.append(threading.Thread(target=lambda: answers.append(crew.ask(answer, [0])[0])))
            threads[0].start()
            threads[0].join(0.5)  # it has that long to do the wrong thing
        return hired.pop(0)

    engines: Any = Engines(Engine(dead=True))
    crew = EngineCrew(engines, hire, 9)
    answers.append(crew.ask(answer, [0])[0])
    threads[0].join(60)
    assert answers[0] is answers[1] and len(hired) == 1 and replaced(crew) == 1
