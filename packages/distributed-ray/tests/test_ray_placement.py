"""Who sits where, worked out without Ray."""

from __future__ import annotations

import pytest

from rlhf_core.errors import UsageError
from rlhf_distributed_ray.placement import Seat, Shape, check_capacity, lay_out, parse_shape

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


def test_the_devices_of_a_node_are_one_bundle_which_ray_keeps_on_one_node() -> None:
    roles = {"actor": Shape(2, 4), "critic": Shape(1, 2), "reference": Shape(3)}
    layout = lay_out(roles, engines=0, together=True, cpus=0.5, gpus=0.25)
    assert layout.groups == (({"CPU": 3.5, "GPU": 1.75}, {"CPU": 2.5, "GPU": 1.25}, {"CPU": 0.5, "GPU": 0.25}),)
    assert [seat.bundle for seat in layout.seats["actor"]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [seat.bundle for seat in layout.seats["critic"]] == [0, 0]
    assert [seat.bundle for seat in layout.seats["reference"]] == [0, 1, 2]


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
    assert parse_shape(text, "--launcher.workers") == shape


@pytest.mark.parametrize("text", ["", "0", "2x", "x2", "-1", "2x2x2", "two", "2x0", "2:WIDE"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"^--launcher.workers .*: give a number of workers, or NODESxDEVICES such as 2x4$"
    ):
        parse_shape(text, "--launcher.workers")


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
