"""Roles that share no bundle work at once; those that do, in turn, as they would in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_distributed_ray.overlap import call_chains
from rlhf_distributed_ray.placement import lay_out
from rlhf_distributed_ray.places import parse_places

ROLES = ["actor", "critic", "reference", "reward"]
LONG = 60.0


def chains_of(place: str) -> list[list[str]]:
    return lay_out(parse_places(place, ROLES, "actor", "PACK", 1), cpus=1, gpus=False).chains(ROLES)


@pytest.mark.parametrize(
    ("place", "chains"),
    [
        ("actor+critic+reference+reward@2", [["actor", "critic", "reference", "reward"]]),
        ("actor@1,critic@1,reference@1,reward@1", [["actor"], ["critic"], ["reference"], ["reward"]]),
        ("actor+reference@2,critic+reward@4", [["actor", "reference"], ["critic", "reward"]]),
    ],
)
def test_who_shares_a_bundle_works_in_turn(place: str, chains: list[list[str]]) -> None:
    assert chains_of(place) == chains


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_chains_are_the_places(home: list[int]) -> None:
    """The independent source: roles with the same number."""
    text = ",".join("+".join(ROLES[k] for k in range(4) if home[k] == place) + "@2" for place in sorted(set(home)))
    expected = {frozenset(ROLES[k] for k in range(4) if home[k] == place) for place in home}
    assert {frozenset(chain) for chain in chains_of(text)} == expected


def test_chains_are_at_work_at_once_and_their_members_in_turn() -> None:
    """Calls of two chains meet at a barrier, which one thread alone would never pass."""
    meeting, order = threading.Barrier(2), list[str]()

    def call(name: str) -> Callable[[], str]:
        def work() -> str:
            meeting.wait(LONG)
            order.append(name)
            return name.upper()

        return work

    calls = {name: call(name) for name in ("actor", "critic", "reference", "reward")}
    found = call_chains(calls, [["actor", "reference"], ["critic", "reward"]])
    assert list(found.items()) == [(name, name.upper()) for name in calls], "in the order in which they were given"
    assert order.index("actor") < order.index("reference") and order.index("critic") < order.index("reward")


def test_an_error_waits_for_those_at_work() -> None:
    """A run that goes on after it finds nobody in the middle of a call."""
    failed, ended = threading.Event(), list[str]()

    def fail() -> None:
        failed.set()
        raise RuntimeError("the actor died")

    def end() -> None:
        assert failed.wait(LONG)
        ended.append("critic")

    with pytest.raises(RuntimeError, match="the actor died"):
        call_chains({"actor": fail, "critic": end}, [["actor"], ["critic"]])
    assert ended == ["critic"]


def test_no_calls_have_no_results() -> None:
    """A step whose credit needs no role, such as one with log-probabilities of the sampler alone."""
    assert call_chains({}, []) == {}
