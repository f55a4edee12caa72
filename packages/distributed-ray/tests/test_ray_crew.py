"""Waiting for actors: who died or hangs is named, and nobody is waited for without an end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")

import torch  # noqa: E402  after the check above

from rlhf_core.errors import WorkerLost  # noqa: E402
from rlhf_core.util.activity import report  # noqa: E402
from rlhf_distributed_ray import arrays  # noqa: E402
from rlhf_distributed_ray.arrays import from_array  # noqa: E402
from rlhf_distributed_ray.crew import Crew  # noqa: E402
from rlhf_distributed_ray.pulse import GROUP, Beating, Limits, Pulse  # noqa: E402
from rlhf_distributed_ray.sending import ReceivedBuckets, narrow, send_weights  # noqa: E402

MEMORY = (
    "6 worker(s) were killed due to the node running low on memory. Memory on the node was 22 GB.\nConsidered: …\n]"
)


@pytest.mark.parametrize(
    ("death", "cause"),
    [
        (ray.exceptions.OutOfMemoryError(MEMORY), "6 worker(s) were killed due to the node running low on memory."),
        (ray.exceptions.WorkerCrashedError(), "The worker died unexpectedly"),
        (ray.exceptions.ActorDiedError(), "The actor died"),
    ],
)
def test_a_death_is_told_with_its_cause_and_not_what_the_other_ranks_made_of_it(
    death: Exception, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 fails first, since rank 1 closed the connection."""
    answers = {"rank 0": ray.exceptions.RayTaskError("train", "Connection closed by peer", OSError()), "rank 1": death}

    def get(reference: str) -> None:
        raise answers[reference]

    monkeypatch.setattr(ray, "wait", lambda pending, **_: (pending[:1], pending[1:]))
    monkeypatch.setattr(ray, "get", get)
    crew = Crew("role actor", [None, None], Limits(60, 60))
    crew.where = [("here", 7), ("there", 8)]
    with pytest.raises(WorkerLost) as caught:
        crew.wait(dict(enumerate(answers))).in_order()
    assert caught.value.who == "role actor rank 1"
    message = str(caught.value)
    assert message.startswith(f"role actor rank 1 on node there (process 8) died: {cause}") and "\n" not in message
    assert message.endswith("; continue from the last checkpoint with resume = true") and len(message) < 400


class Sleeper(Beating):
    """An actor that works, reporting progress, or stands still."""

    def initialize(self) -> tuple[str, int]:
        self.count_progress()
        return "here", os.getpid()

    def work(self, seconds: float, parts: int) -> int:
        for part in range(parts):
            report("working", part, parts)
            time.sleep(seconds / parts)
        return parts

    def deadlock(self) -> None:
        threading.Event().wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def crew_of(limits: Limits) -> Crew:
    actors = [ray.remote(concurrency_groups={GROUP: 1})(Sleeper).options(num_cpus=0.1).remote() for _ in range(2)]
    crew = Crew("role actor", actors, limits)
    crew.where = crew.call("initialize")
    return crew


def test_a_stopped_process_is_killed_and_named(cluster: None) -> None:
    """SIGSTOP: the process is there and answers nothing; the other rank works on, and may be late on a busy machine."""
    crew = crew_of(Limits(patience=10, stall=600))
    node, process = crew.where[1]
    calls = {rank: actor.work.remote(3600, 3600) for rank, actor in enumerate(crew.actors)}
    os.kill(process, signal.SIGSTOP)
    found = crew.wait(calls, grace=0.5)
    assert set(found.deaths) == {1}
    told = rf"^role actor rank 1 on node {node} \(process {process}\) died: it sent no heartbeat for \d+ s; continue"
    with pytest.raises(WorkerLost, match=told):
        found.in_order()
    for actor in crew.actors:
        ray.kill(actor)


def test_a_deadlock_is_found_where_progress_stands_still_and_slow_work_is_not_one(cluster: None) -> None:
    """Both ranks answer, and one of them reports parts of its work for longer than a call may stand still."""
    crew = crew_of(Limits(patience=600, stall=10))
    found = crew.send(lambda actor, rank: actor.work.remote(15, 150) if rank == 0 else actor.work.remote(0, 1))
    assert found.in_order() == [150, 1]
    crew._longest = 0.0  # else ten times the 15 s are waited for
    found = crew.wait({0: crew.actors[0].work.remote(3600, 36000), 1: crew.actors[1].deadlock.remote()}, grace=0.5)
    assert set(found.deaths) == {1}
    with pytest.raises(WorkerLost, match=r"rank 1 .* died: it made no progress for \d+ s; "):
        found.in_order()
    for actor in crew.actors:
        ray.kill(actor)


class Clock:
    """Time that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def silent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An actor that never answers."""
    monkeypatch.setattr(ray, "wait", lambda pending, **_: ([], pending))
    return SimpleNamespace(beat=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: "asked")))


def test_time_in_which_the_controller_itself_was_stopped_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, actor = Clock(monkeypatch), silent(monkeypatch)
    pulse = Pulse(Limits(patience=20, stall=1000))
    pulse._known = True
    pulse.begin()
    clock.now += 3600  # Ctrl-Z of the controller
    assert pulse.look(actor, 0) == ""
    seconds = 0
    while not (why := pulse.look(actor, 0)):
        clock.now += 1
        seconds += 1
    assert 10 < seconds <= 21 and why == "it sent no heartbeat for 21 s"


def test_a_call_may_stand_still_for_ten_times_the_longest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, actor = Clock(monkeypatch), silent(monkeypatch)
    monkeypatch.setattr(ray, "wait", lambda pending, **_: (pending, []))
    monkeypatch.setattr(ray, "get", lambda _: 5)  # it answers, and its progress is always the same
    pulse = Pulse(Limits(patience=1e9, stall=5))
    pulse.begin()
    assert pulse.look(actor, 7.0) == ""
    for _ in range(70):
        clock.now += 1
        assert pulse.look(actor, 7.0) == ""
    clock.now += 1
    assert pulse.look(actor, 7.0) == "it made no progress for 71 s"


def test_a_process_that_starts_has_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, actor = Clock(monkeypatch), silent(monkeypatch)
    pulse = Pulse(Limits(patience=5, stall=5))
    pulse.begin()
    for _ in range(600):
        clock.now += 1
        assert pulse.look(actor, 0) == ""
    clock.now += 1
    assert pulse.look(actor, 0) == "it sent no heartbeat for 601 s"


def test_a_process_that_has_answered_a_call_is_one_that_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first call may end before its first heartbeat is asked for."""
    clock, actor = Clock(monkeypatch), silent(monkeypatch)
    monkeypatch.setattr(ray, "wait", lambda pending, **_: (pending, []))
    monkeypatch.setattr(ray, "get", lambda _: "done")
    crew = Crew("rollout engine", [actor], Limits(patience=5, stall=5))
    crew.wait({0: "call"})
    silent(monkeypatch)
    crew._pulses[0].begin()
    for _ in range(5):
        clock.now += 1
        assert crew._pulses[0].look(actor, 0) == ""
    clock.now += 1
    assert crew._pulses[0].look(actor, 0) == "it sent no heartbeat for 6 s"


def test_an_actor_out_of_reach_is_killed_so_that_another_gets_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC gives up a stopped process after minutes. Ray reports it as unavailable and waits for it."""
    killed: list[object] = []

    def get(_: str) -> None:
        raise ray.exceptions.ActorUnavailableError("keepalive watchdog timeout", None)

    monkeypatch.setattr(ray, "wait", lambda pending, **_: (pending, []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", killed.append)
    crew = Crew("rollout engine", ["actor"], Limits(60, 60))
    assert set(crew.wait({0: "call"}).deaths) == {0}
    assert killed == ["actor"]


class Sink:
    """An engine that keeps the buckets it is given."""

    def __init__(self) -> None:
        self.buckets: dict[int, Any] = {}

    def process(self) -> int:
        return os.getpid()

    def receive(self, role: str, sync: int, number: int, bucket: Any) -> None:
        assert (role, sync) == ("actor", 7)
        self.buckets[number] = bucket

    def all(self) -> Any:
        return [self.buckets[number] for number in sorted(self.buckets)]


def test_weights_reach_every_engine_that_lives_and_the_others_are_named(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty buckets; one engine is dead, one stopped."""
    monkeypatch.setattr(arrays, "BUCKET_BYTES", 32)
    sinks = [ray.remote(Sink).options(num_cpus=0.1).remote() for _ in range(3)]
    processes = ray.get([sink.process.remote() for sink in sinks])
    os.kill(processes[1], signal.SIGKILL)
    os.kill(processes[2], signal.SIGSTOP)
    weights = {f"w{k}": torch.randn(8, generator=torch.Generator().manual_seed(k)) for k in range(20)}
    sent = send_weights(iter(weights.items()), sinks, "actor", 7, patience=10)
    assert len(sent.buckets) == 20 and sent.late == [1, 2]
    got = {name: from_array(packed) for bucket in ray.get(sinks[0].all.remote()) for name, packed in bucket}
    assert got.keys() == weights.keys() and all(torch.equal(got[name], weights[name]) for name in weights)
    for sink in sinks:
        ray.kill(sink)


def test_matrices_travel_in_the_dtype_of_the_engine_and_take_half_the_bytes() -> None:
    """Matrices arrive as an engine in bfloat16 would round them itself, to the bit."""
    drawn = torch.Generator().manual_seed(0)
    weights = {"matrix": torch.randn(64, 48, generator=drawn), "norm": torch.randn(48, generator=drawn)}
    weights |= {"counter": torch.arange(6).view(2, 3), "half": torch.randn(4, 4, generator=drawn).half()}

    def sent(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], int]:
        (bucket,) = arrays.buckets(narrow(weights.items(), dtype))
        return {name: from_array(packed) for name, packed in bucket}, sum(array.nbytes for _, (_, array) in bucket)

    whole, all_bytes = sent(torch.float32)
    assert all(torch.equal(whole[name], weights[name]) for name in weights)
    cut, fewer = sent(torch.bfloat16)
    engine = torch.empty(64, 48, dtype=torch.bfloat16).copy_(weights["matrix"])
    assert torch.equal(cut["matrix"], engine) and all_bytes - fewer == 64 * 48 * 2
    assert all(torch.equal(cut[name], weights[name]) for name in ("norm", "counter", "half"))


def test_a_bucket_that_comes_twice_counts_once_and_a_missing_one_is_no_sync() -> None:
    received = ReceivedBuckets()
    assert [received.accept(1, number, 10) for number in (0, 1, 1, 0)] == [True, True, False, False]
    assert received.bytes == 20
    received.check(1, 2)
    for sync, count in ((1, 3), (2, 2)):
        with pytest.raises(AssertionError):
            received.check(sync, count)
    assert received.accept(2, 1, 10) and received.bytes == 10, "another sync begins anew"


def test_the_late_report_of_an_actor_that_was_replaced_leaves_the_new_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads wait for an engine while one samples and one brings weights; the other one has replaced it."""
    crew, killed, looked = Crew("rollout engine", ["old"], Limits(10, 10)), list[Any](), list[Any]()

    def get(_: Any) -> Any:
        raise ray.exceptions.ActorUnavailableError("keepalive watchdog timeout", None)

    def wait(pending: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        if looked:
            return pending, []
        crew.actors[0] = "new"
        return [], pending

    def look(_: Any, actor: Any, __: float) -> str:
        looked.append(actor)
        return ""

    monkeypatch.setattr(Pulse, "look", look)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", killed.append)
    assert list(crew.wait({0: "call"}, asked={0: "old"}).deaths) == [0]
    assert looked == ["old"] and killed == ["old"]
