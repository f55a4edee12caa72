"""Residents of a device: never over the budget, weights before the cache, the least recently used sleeps first."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.errors import UsageError
from rlhf_core.launcher.residents import GIB, Resident, Residents


class Device:
    """An accountant of its own: what is on it, by resident and part, and in which order it came."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], int] = {}
        self.events: list[str] = []

    @property
    def bytes(self) -> int:
        return sum(self.held.values())

    def resident(self, name: str, known: bool = True, **sizes: int) -> Resident:
        """Someone who takes `sizes` by part; on the device from the start if `known`."""
        parts = list(sizes)

        def sleep(level: int) -> int:
            self.events.append(f"{name} sleeps {level}")
            return sum(self.held.pop((name, part), 0) for part in parts)

        def wake(part: str) -> int:
            self.events.append(f"{name} wakes {part}")
            assert (name, part) not in self.held
            self.held[name, part] = sizes[part]
            return sizes[part]

        if known:
            self.held |= {(name, part): sizes[part] for part in parts}
        expected: Any = dict(sizes) if known else None
        return Resident(name, sleep, wake, expected, parts=tuple(parts))  # type: ignore[arg-type]


def three(budget: int) -> tuple[Residents, Device]:
    device, residents = Device(), Residents(budget)
    residents.add(device.resident("actor", all=6))
    residents.add(device.resident("critic", all=4))
    residents.make_room(5, "load the rollout engine")
    residents.add(device.resident("rollout", weights=3, cache=2))
    return residents, device


def test_the_least_recently_used_sleeps_first() -> None:
    residents, device = three(15)
    with residents.awake("actor", use="ask the actor"):
        assert device.events == [], "all fit"
    with residents.awake("critic", work=5, use="train the critic"):
        assert device.events == ["rollout sleeps 2"], "it worked longest ago, and an update follows training"
        assert residents.taken_bytes == 15
    assert residents.taken_bytes == 10


def test_an_engine_takes_weights_before_it_has_room_for_its_cache() -> None:
    residents, device = three(9)
    with residents.awake("actor", use="train the actor"):
        pass
    device.events.clear()
    with residents.awake("rollout", "actor", part="weights", use="sync the rollout engine"):
        assert device.bytes == 9
    with residents.awake("rollout", use="sample the actor"):
        assert device.bytes == 5
    assert device.events == ["rollout wakes weights", "actor sleeps 1", "rollout wakes cache"]


def test_a_cache_that_leaves_no_room_sleeps_while_weights_come() -> None:
    residents, device = three(9)
    with residents.awake("critic", work=5, use="ask the critic"):
        pass
    with residents.awake("rollout", use="sample the actor"):
        pass
    assert sorted(device.held) == [("critic", "all"), ("rollout", "cache"), ("rollout", "weights")]
    device.events.clear()
    with residents.awake("rollout", "actor", part="weights", use="sync the rollout engine"):
        assert device.bytes == 9
    assert device.events == ["rollout sleeps 2", "critic sleeps 2", "rollout wakes weights", "actor wakes all"]


def test_weights_are_dropped_where_an_update_came_next_the_last_time() -> None:
    residents, device = three(11)
    for _ in range(2):
        with residents.awake("rollout", use="sample the actor"):
            pass
        with residents.awake("actor", work=5, use="ask the actor"):  # puts the engine to sleep
            pass
        with residents.awake("rollout", "actor", part="weights", use="sync the rollout engine"):
            pass
    levels = [event for event in device.events if event.startswith("rollout sleeps")]
    assert levels == ["rollout sleeps 1", "rollout sleeps 2"]


def test_whose_size_is_not_known_has_the_device_alone_until_it_is_measured() -> None:
    device, residents = Device(), Residents(10)
    residents.add(device.resident("actor", all=4))
    residents.add(device.resident("rollout", known=False, weights=3, cache=2))
    with residents.awake("rollout", use="sample the actor"):
        assert device.bytes == 5
    with residents.awake("actor", use="train the actor"):
        assert device.bytes == 4
    with residents.awake("rollout", use="sample the actor"):
        assert device.bytes == 9, "both fit"


def test_who_points_into_the_memory_of_another_sleeps_before_it() -> None:
    device, residents = Device(), Residents(10)
    residents.add(device.resident("actor", all=6))
    engine = device.resident("rollout", all=1)
    engine.follows = frozenset({"actor"})
    residents.add(engine)
    residents.make_room(5, "load the critic")
    assert device.events == ["rollout sleeps 1", "actor sleeps 1"]


def test_what_does_not_fit_is_refused_in_one_line_and_leaves_everything_usable() -> None:
    residents, device = three(12)
    with (
        pytest.raises(
            UsageError, match=r"^no room to train the actor: it needs .* but the limit is .*; raise .*share_gib.*$"
        ),
        residents.awake("actor", work=7, use="train the actor"),
    ):
        pytest.fail("it was let in")
    with (
        residents.awake("critic", use="ask the critic"),
        pytest.raises(UsageError, match="in addition to .* of critic"),
        residents.awake("actor", work=3, use="ask the actor"),
    ):
        pytest.fail("it was let in")
    with residents.awake("actor", work=6, use="train the actor"):
        assert device.bytes == 6


def test_a_failure_inside_leaves_nobody_pinned() -> None:
    residents, device = three(12)
    with pytest.raises(ZeroDivisionError), residents.awake("actor", work=6, use="train the actor"):
        raise ZeroDivisionError
    with residents.awake("critic", work=8, use="ask the critic"):
        assert device.bytes == 4


def test_metrics_count_the_bytes_of_all_switches_once() -> None:
    residents, _ = three(12)
    with residents.awake("actor", work=6, use="train the actor"):
        pass
    metrics = residents.metrics()
    assert {name: value * GIB for name, value in metrics.items() if name.endswith("gib")} == {
        "sleep/actor/gib": 12.0,
        "sleep/critic/gib": 4.0,
        "sleep/rollout/gib": 5.0,
    }
    assert all(metrics[f"sleep/{name}/seconds"] >= 0 for name in ("actor", "critic", "rollout"))
    assert residents.metrics() == {}


calls = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=30)


@given(
    st.lists(st.integers(1, 20), min_size=3, max_size=3), st.integers(1, 9), st.integers(0, 9), calls, st.integers(0, 9)
)
def test_bytes_never_exceed_a_budget_in_which_each_fits_alone(
    roles: list[int], weights: int, cache: int, calls: list[tuple[int, int, bool]], spare: int
) -> None:
    budget = max(max(roles) + weights, weights + cache, max(roles) + 9) + spare
    device, residents = Device(), Residents(budget)
    sizes = {f"role {k}": size for k, size in enumerate(roles)}
    for name, size in sizes.items():
        residents.make_room(size, "load")
        residents.add(device.resident(name, all=size))
        assert device.bytes <= budget
    residents.make_room(weights + cache, "load")
    residents.add(device.resident("rollout", weights=weights, cache=cache))
    for number, work, sync in calls:
        with ExitStack() as stack:
            if number < 3:
                use = f"train role {number}" if sync else f"ask role {number}"
                stack.enter_context(residents.awake(f"role {number}", work=work, use=use))
                held = sizes[f"role {number}"]
            elif sync:
                stack.enter_context(residents.awake("rollout", "role 0", part="weights", use="sync it"))
                held, work = sizes["role 0"] + weights, 0
            else:
                stack.enter_context(residents.awake("rollout", use="sample role 0"))
                held, work = weights + cache, 0
            assert held <= device.bytes <= budget - work
            assert residents.taken_bytes == device.bytes + work
    wakes = [event.split()[-1] for event in device.events if event.startswith("rollout wakes")]
    assert not wakes or wakes[0] == "weights"
