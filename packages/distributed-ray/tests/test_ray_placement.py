"""Placement of workers, computed without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_core.errors import UsageError
from rlhf_core.rollout.fake import FakeRollout
from rlhf_core.testing import tiny_run
from rlhf_distributed_ray.launcher import RayLauncher
from rlhf_distributed_ray.placement import Layout, Seat, check_capacity, check_devices, lay_out
from rlhf_distributed_ray.places import Place, Shape, parse_places, parse_shape

ROLES = {"actor": Shape(2), "reference": Shape(1)}


def together(roles: dict[str, Shape], engines: int, cpus: float, gpus: bool, strategy: str = "PACK") -> Layout:
    """Everyone in one place."""
    everyone = {**roles, **({"engine": Shape(engines)} if engines else {})}
    return lay_out([Place(everyone, strategy)], cpus, gpus)


def separate(roles: dict[str, Shape], engines: int, cpus: float, gpus: bool, strategy: str = "PACK") -> Layout:
    """Everyone in a place of their own."""
    everyone = {**roles, **({"engine": Shape(engines)} if engines else {})}
    places = [Place({name: shape}, shape.strategy or strategy) for name, shape in everyone.items()]
    return lay_out(places, cpus, gpus)


def test_together_rank_k_of_everyone_shares_bundle_k() -> None:
    layout = together(ROLES, engines=1, cpus=0.5, gpus=False)
    assert layout.groups == (({"CPU": 1.5}, {"CPU": 0.5}),)
    assert layout.seats["actor"] == (Seat(0, 0), Seat(0, 1))
    assert layout.seats["reference"] == layout.seats["engine"] == (Seat(0, 0),)


def test_separate_everyone_has_bundles_of_its_own() -> None:
    layout = separate(ROLES, engines=2, cpus=1.0, gpus=True)
    one = {"CPU": 1.0, "GPU": 1.0}
    assert layout.groups == ((one, one), (one,), (one, one))
    assert layout.seats["engine"] == (Seat(2, 0), Seat(2, 1))


def test_the_devices_of_a_node_are_one_group_which_ray_keeps_on_one_node() -> None:
    roles = {"actor": Shape(2, 4), "critic": Shape(1, 2), "reference": Shape(3)}
    layout = together(roles, engines=0, cpus=0.5, gpus=True)
    first = ({"CPU": 1.5, "GPU": 1.0}, {"CPU": 1.5, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 1.0})
    assert layout.groups == (first, ({"CPU": 0.5, "GPU": 1.0},) * 4)
    assert layout.strategies == ("STRICT_PACK", "STRICT_PACK") and layout.apart == ()
    assert layout.seats["actor"] == tuple(Seat(node, device) for node in range(2) for device in range(4))
    assert (
        layout.seats["critic"] == layout.seats["actor"][:2] and layout.seats["reference"] == layout.seats["actor"][:3]
    )


def test_nodes_that_are_spread_strictly_are_groups_apart() -> None:
    layout = separate({"actor": Shape(2, 2, "STRICT_SPREAD"), "reference": Shape(1)}, 0, cpus=1, gpus=False)
    assert layout.strategies == ("STRICT_PACK", "STRICT_PACK", "PACK")
    assert layout.apart == (frozenset({0, 1}),) and layout.spread == ()


def test_nodes_that_are_spread_are_groups_that_prefer_different_nodes() -> None:
    layout = separate({"reference": Shape(1), "actor": Shape(3, 2, "SPREAD")}, 0, cpus=1, gpus=False)
    assert layout.strategies == ("PACK", "STRICT_PACK", "STRICT_PACK", "STRICT_PACK")
    assert layout.spread == (frozenset({1, 2, 3}),) and layout.apart == ()


@pytest.mark.parametrize("text", ["3", "1x3", "3x1", "2x2"])
@pytest.mark.parametrize("arrange", [together, separate])
@pytest.mark.parametrize("others", range(9))
def test_ranks_of_a_role_never_share_a_bundle_and_those_in_one_fit_its_gpu(
    text: str, arrange: Callable[..., Layout], others: int
) -> None:
    """So no two of them can be on one GPU, wherever Ray puts bundles and however it packs shares."""
    roles = {"actor": parse_shape(text, ""), **{f"role{k}": Shape(2) for k in range(others)}}
    layout = arrange(roles, engines=2, cpus=0.1, gpus=True)
    assert all(len(set(seats)) == len(seats) for seats in layout.seats.values())
    for seat in {seat for seats in layout.seats.values() for seat in seats}:
        sharing = sum(seat in seats for seats in layout.seats.values())
        room, share = layout.groups[seat.group][seat.bundle]["GPU"], layout.share(seat)["GPU"]
        counted = round(share, 4)  # Ray counts ten-thousandths
        assert room == 1.0 and 0.99 <= sharing * counted <= room


def test_ppo_on_eight_gpus_needs_no_options() -> None:
    """Actor, critic, reference and engine k are on GPU k, a quarter for each."""
    layout = together({role: Shape(8) for role in ("actor", "critic", "reference")}, engines=8, cpus=0.25, gpus=True)
    check_capacity(layout, [{"CPU": 8.0, "GPU": 8.0}])
    assert layout.share(Seat(0, 7)) == {"CPU": 0.25, "GPU": 0.25}
    assert layout.sitting(Seat(0, 7)) == ["actor", "critic", "reference", "engine"]


def test_a_partition_has_shares_strategies_and_resources_of_its_own() -> None:
    text = "actor+reference@2x4:strict_spread, critic+reward@4, engine[tp=2]@3,RAM=64"
    places = parse_places(text, ["actor", "critic", "reference", "reward"], "actor", "SPREAD", devices=2)
    layout = lay_out(places, cpus=0.5, gpus=True)
    assert layout.strategies == ("STRICT_PACK", "STRICT_PACK", "SPREAD", "SPREAD") and layout.apart == ({0, 1},)
    assert layout.groups[:2] == (({"CPU": 1.0, "GPU": 1.0},) * 4,) * 2
    assert layout.groups[3] == ({"CPU": 0.5, "GPU": 2.0, "RAM": 64.0},) * 3
    assert layout.share(Seat(3, 0)) == {"CPU": 0.5, "GPU": 2.0, "RAM": 64.0}, "an engine has all of its bundle"
    assert layout.share(layout.seats["critic"][3]) == {"CPU": 0.5, "GPU": 0.5}


def test_engines_sit_with_the_role_that_they_sample_unless_they_have_a_place() -> None:
    places = parse_places("critic@1,actor@3", ["actor", "critic"], "actor", "PACK", devices=1)
    layout = lay_out(places, cpus=1, gpus=False)
    assert layout.seats["engine"] == layout.seats["actor"] and len(layout.seats["engine"]) == 3
    offline = parse_places("critic@1,actor@3", ["actor", "critic"], "", "PACK", devices=1)
    assert all("engine" not in place.members for place in offline)


def test_a_place_may_do_without_gpus() -> None:
    layout = lay_out(parse_places("a@1,GPU=0,b@1", ["a", "b"], "", "PACK", 1), cpus=1, gpus=True)
    assert layout.groups == (({"CPU": 1.0},), ({"CPU": 1.0, "GPU": 1.0},))


def test_a_place_of_nothing_is_refused_in_one_line() -> None:
    """Ray ends with a traceback where a bundle is empty."""
    with pytest.raises(UsageError, match=r"^place gives b no resource at all; give CPU or another one$"):
        lay_out(parse_places("a@1,b@1,CPU=0", ["a", "b"], "", "PACK", 1), cpus=1, gpus=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"^place '': give NAMES@BUNDLES, such as actor\+reference@8, or together or separate$"),
        ("toegther", r"^place 'toegther': give NAMES@BUNDLES, "),
        ("RAM=3", r"^place 'RAM=3': give NAMES@BUNDLES, "),
        (
            "actor@2",
            r"^place has no place for critic; add critic@1 as a separate place, or \+critic to an existing place$",
        ),
        ("actor@2,critic@0", r"^place '0': give a number of workers, or NODESxDEVICES such as 2x4$"),
        ("actor@2,critic@1:WIDE", r"^place '1:WIDE': give a number of workers"),
        (
            "actor@2,critc@1",
            r"^place 'critc@1': this run has no 'critc' \(did you mean 'critic'\?\); it has actor, critic, ",
        ),
        ("actor+actor@2,critic@1", r"^place 'actor\+actor@2' names actor twice; name it once$"),
        ("actor@2,critic+actor@1", r"^place gives actor two places; name it once$"),
        ("actor[tp=2]@2,critic@1", r"^place 'actor\[tp=2\]': each engine of this run uses 1 GPU; change that with "),
        ("actor+critic@2,engine[tp=4]@1", r"^place 'engine\[tp=4\]': each engine of this run uses 1 GPU; "),
        ("actor+critic@2,GPU=0.5", r"^place 'GPU=0.5': give RESOURCE=AMOUNT, such as GPU=0 or RAM=64, and whole GPUs$"),
        ("actor+critic@2,RAM=much", r"^place 'RAM=much': give RESOURCE=AMOUNT"),
        ("actor+critic@2,gpu=0", r"^place 'gpu=0': a worker cannot request gpu; Ray's name is GPU$"),
        ("actor+critic@2,object_store_memory=9", r"^place '.*': a worker cannot request object_store_memory$"),
    ],
)
def test_what_is_no_partition_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        parse_places(text, ["actor", "critic"], "actor", "PACK", devices=1)
    assert "\n" not in str(caught.value)


def test_two_ranks_on_one_gpu_are_refused_by_name() -> None:
    check_devices("actor", [[("a", "0")], [("a", "1")], [("b", "0")], []])
    with pytest.raises(UsageError, match=r"^ranks 0 and 2 of role actor were given the same GPU 0 of node a; use "):
        check_devices("actor", [[("a", "0")], [("a", "1")], [("a", "0")]])


def test_each_role_that_stands_alone_may_be_laid_out_in_its_own_way() -> None:
    roles = {"actor": Shape(2, 1, "STRICT_SPREAD"), "reference": Shape(1)}
    assert separate(roles, 1, cpus=1, gpus=False, strategy="SPREAD").strategies == (
        "STRICT_SPREAD",
        "SPREAD",
        "SPREAD",
    )


def test_an_offline_run_has_no_engine() -> None:
    assert "engine" not in together(ROLES, engines=0, cpus=1, gpus=False).seats


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1", Shape(1)),
        ("3", Shape(3)),
        ("2x4", Shape(2, 4)),
        ("2X1", Shape(2, 1)),
        ("2x4:spread", Shape(2, 4, "SPREAD")),
    ],
)
def test_shapes_are_workers_or_nodes_times_devices(text: str, shape: Shape) -> None:
    assert parse_shape(text, "workers") == shape


@pytest.mark.parametrize("text", ["", "0", "2x", "x2", "-1", "2x2x2", "two", "2x0", "2:WIDE"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^workers .*: give a number of workers, or NODESxDEVICES such as 2x4$"):
        parse_shape(text, "workers")


def test_more_than_the_cluster_has_is_refused_with_the_sum() -> None:
    layout = separate(ROLES, engines=1, cpus=1.0, gpus=True)
    with pytest.raises(
        UsageError,
        match=r"^launcher ray needs 4 GPU for 2 x actor, 1 x reference, 1 x engine, but the cluster has 2; request less with ",
    ):
        check_capacity(layout, [{"CPU": 8.0, "GPU": 2.0}])
    check_capacity(layout, [{"CPU": 4.0, "GPU": 4.0}])


@pytest.mark.parametrize(("text", "strategy"), [("1x4", "PACK"), ("4", "STRICT_PACK")])
def test_what_must_be_on_one_node_must_fit_on_one(text: str, strategy: str) -> None:
    layout = together({"actor": parse_shape(text, "")}, 0, cpus=1.0, gpus=False, strategy=strategy)
    with pytest.raises(
        UsageError, match=r"^launcher ray needs 4 CPU on one node, but the largest node has 2; request less "
    ):
        check_capacity(layout, [{"CPU": 2.0}, {"CPU": 2.0}])
    check_capacity(layout, [{"CPU": 2.0}, {"CPU": 4.0}])


def test_strict_spread_needs_as_many_nodes_as_bundles() -> None:
    layout = together(ROLES, engines=0, cpus=0.1, gpus=False, strategy="STRICT_SPREAD")
    with pytest.raises(UsageError, match=r"STRICT_SPREAD needs 2 nodes, but the cluster has 1"):
        check_capacity(layout, [{"CPU": 8.0}])
    check_capacity(layout, [{"CPU": 8.0}, {"CPU": 8.0}])


class Served(FakeRollout):
    """An engine that brings weights to servers outside of the run."""

    single_engine = True


def places(rollout: FakeRollout, **options: Any) -> dict[str, int]:
    """Workers of each role, and engines, under the launcher with these options."""
    plan = tiny_run("unused", rollout=rollout, batch_size=4).plan
    groups = RayLauncher(**options)._places(plan)
    return {name: shape.workers for place in groups for name, shape in place.members.items()}


@pytest.mark.parametrize("place", ["together", "separate"])
def test_one_engine_brings_weights_to_servers_however_many_workers_there_are(place: str) -> None:
    assert places(FakeRollout(), workers="2", place=place) == {"actor": 2, "engine": 2}
    assert places(Served(), workers="2", place=place) == {"actor": 2, "engine": 1}


@pytest.mark.parametrize("options", [{"engines": 2, "workers": "2"}, {"place": "actor@2,engine@2"}])
def test_several_engines_that_bring_weights_to_servers_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"engines 2 is not supported by rollout .*Served.*; pass engines = 1$"):
        places(Served(), **options)
    assert places(FakeRollout(), **options)["engine"] == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cpus": 0.0}, "cpus 0: give at least 0.0001, the smallest share that Ray counts"),
        ({"cpus": -1.0}, "cpus -1: give at least 0.0001, the smallest share that Ray counts"),
        ({"cpus": float("nan")}, "cpus nan: give at least 0.0001, the smallest share that Ray counts"),
        ({"patience": float("nan")}, "patience nan: give a number of seconds above 0"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"wait": -1.0}, "wait must be at least 0, not -1.0"),
        (
            {"workers": "2:STRICT_SPREAD"},
            "workers '2:STRICT_SPREAD': roles that share a place must have the same layout; use strategy",
        ),
    ],
)
def test_numbers_and_strategies_that_would_do_nothing_are_refused_before_a_start(
    options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError) as caught:
        places(FakeRollout(), **options)
    assert str(caught.value).startswith(told)
