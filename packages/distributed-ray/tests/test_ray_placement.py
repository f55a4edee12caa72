"""Who sits where, worked out without Ray."""

from __future__ import annotations

import pytest

from rlhf_core.errors import UsageError
from rlhf_distributed_ray.placement import Seat, Shape, check_capacity, check_devices, lay_out, parse_shape

ROLES = {"actor": Shape(2), "reference": Shape(1)}


def test_together_rank_k_of_everyone_shares_bundle_k() -> None:
    layout = lay_out(ROLES, engines=1, together=True, cpus=0.5, gpus=0.0)
    assert layout.groups == (({"CPU": 1.5}, {"CPU": 0.5}),)
    assert layout.seats["actor"] == (Seat(0, 0), Seat(0, 1))
    assert layout.seats["reference"] == layout.seats["engine"] == (Seat(0, 0),)


def test_separate_everyone_has_bundles_of_its_own() -> None:
    layout = lay_out(ROLES, engines=2, together=False, cpus=1.0, gpus=1.0)
    one = {"CPU": 1.0, "GPU": 1.0}
    assert layout.groups == ((one, one), (one,), (one, one))
    assert layout.seats["engine"] == (Seat(2, 0), Seat(2, 1))


def test_the_devices_of_a_node_are_one_group_which_ray_keeps_on_one_node() -> None:
    roles = {"actor": Shape(2, 4), "critic": Shape(1, 2), "reference": Shape(3)}
    layout = lay_out(roles, engines=0, together=True, cpus=0.5, gpus=0.25)
    first = ({"CPU": 1.5, "GPU": 1.0}, {"CPU": 1.5, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 1.0})
    assert layout.groups == (first, ({"CPU": 0.5, "GPU": 1.0},) * 4)
    assert layout.strategies == ("STRICT_PACK", "STRICT_PACK") and layout.apart == ()
    assert layout.seats["actor"] == tuple(Seat(node, device) for node in range(2) for device in range(4))
    assert (
        layout.seats["critic"] == layout.seats["actor"][:2] and layout.seats["reference"] == layout.seats["actor"][:3]
    )


def test_nodes_that_are_spread_strictly_are_groups_apart() -> None:
    layout = lay_out({"actor": Shape(2, 2, "STRICT_SPREAD"), "reference": Shape(1)}, 0, together=False, cpus=1, gpus=0)
    assert layout.strategies == ("STRICT_PACK", "STRICT_PACK", "PACK")
    assert layout.apart == (frozenset({0, 1}),)


@pytest.mark.parametrize("text", ["3", "1x3", "3x1", "2x2"])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.75, 1.0, 2.0])
def test_ranks_of_a_role_never_share_a_bundle_and_bundles_have_whole_gpus(
    text: str, together: bool, share: float
) -> None:
    """So no two of them can be on one GPU, wherever Ray puts bundles and however it packs shares."""
    roles = {"actor": parse_shape(text, ""), "critic": Shape(2), "reference": Shape(1, 2)}
    layout = lay_out(roles, engines=2, together=together, cpus=0.1, gpus=share)
    assert all(len(set(seats)) == len(seats) for seats in layout.seats.values())
    assert all(bundle["GPU"] == int(bundle["GPU"]) for group in layout.groups for bundle in group)
    for seat in {seat for seats in layout.seats.values() for seat in seats}:
        sharing = sum(seat in seats for seats in layout.seats.values())
        room = layout.groups[seat.group][seat.bundle]["GPU"]
        assert sharing * share - 1e-9 <= room < sharing * share + 1, "room for all of them, and no GPU more"


def test_two_ranks_on_one_gpu_are_refused_by_name() -> None:
    check_devices("actor", [[("a", "0")], [("a", "1")], [("b", "0")], []])
    with pytest.raises(UsageError, match=r"^ranks 0 and 2 of role actor were given the same GPU 0 of node a; use "):
        check_devices("actor", [[("a", "0")], [("a", "1")], [("a", "0")]])


def test_each_role_that_stands_alone_may_be_laid_out_in_its_own_way() -> None:
    roles = {"actor": Shape(2, 1, "STRICT_SPREAD"), "reference": Shape(1)}
    assert lay_out(roles, 1, together=False, cpus=1, gpus=0, strategy="SPREAD").strategies == (
        "STRICT_SPREAD",
        "SPREAD",
        "SPREAD",
    )


def test_an_offline_run_has_no_engine() -> None:
    assert "engine" not in lay_out(ROLES, engines=0, together=True, cpus=1, gpus=0).seats


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
    layout = lay_out(ROLES, engines=1, together=False, cpus=1.0, gpus=1.0)
    with pytest.raises(
        UsageError,
        match=r"^launcher ray needs 4 GPU for 2 x actor, 1 x reference, 1 x engine, the cluster has 2; lower ",
    ):
        check_capacity(layout, [{"CPU": 8.0, "GPU": 2.0}])
    check_capacity(layout, [{"CPU": 4.0, "GPU": 4.0}])


@pytest.mark.parametrize(("text", "strategy"), [("1x4", "PACK"), ("4", "STRICT_PACK")])
def test_what_must_be_on_one_node_must_fit_on_one(text: str, strategy: str) -> None:
    layout = lay_out({"actor": parse_shape(text, "")}, 0, together=True, cpus=1.0, gpus=0.0, strategy=strategy)
    with pytest.raises(UsageError, match=r"^launcher ray needs 4 CPU on one node, the largest has 2; lower "):
        check_capacity(layout, [{"CPU": 2.0}, {"CPU": 2.0}])
    check_capacity(layout, [{"CPU": 2.0}, {"CPU": 4.0}])


def test_strict_spread_needs_as_many_nodes_as_bundles() -> None:
    layout = lay_out(ROLES, engines=0, together=True, cpus=0.1, gpus=0.0, strategy="STRICT_SPREAD")
    with pytest.raises(UsageError, match=r"STRICT_SPREAD needs 2 nodes, the cluster has 1"):
        check_capacity(layout, [{"CPU": 8.0}])
    check_capacity(layout, [{"CPU": 8.0}, {"CPU": 8.0}])
