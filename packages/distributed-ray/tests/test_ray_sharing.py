"""Roles and engines of a bundle take turns on its device: the same numbers, one asleep while another works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from rlhf_core import Registry, Run  # noqa: E402  after the checks above
from rlhf_core.config.builder import parse  # noqa: E402
from rlhf_core.contract.memory import RoleMemory  # noqa: E402
from rlhf_core.launcher import sharing  # noqa: E402
from rlhf_core.launcher.residents import GIB  # noqa: E402
from rlhf_core.launcher.sharing import SharingOptions  # noqa: E402
from rlhf_distributed_ray.placement import Layout, Seat  # noqa: E402
from rlhf_distributed_ray.pulse import Limits  # noqa: E402
from rlhf_distributed_ray.sending import Shipment  # noqa: E402
from rlhf_distributed_ray.sharing import RayTurns, SharedRoleGroup, neighbors  # noqa: E402
from rlhf_distributed_ray.transport import Shipper  # noqa: E402

WORK = 2**20
BUDGET = (2 * 1_400_000 + WORK) / GIB
"""room for one role at work, and for the weights of an engine with the role that they come from"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stated forecast, so that no model is traced here."""

    def expected(plan: Any, budget: int, ranks: int) -> dict[str, RoleMemory]:
        held = {name: 1_400_000 if spec.trained else 470_000 for name, spec in plan.roles.items()}
        return {name: RoleMemory(weights=size, inference=WORK, activations=WORK) for name, size in held.items()}

    monkeypatch.setattr(sharing, "expected_memory", expected)


def finish(words: list[str], output: Path) -> tuple[list[dict[str, float]], bytes]:
    """The metrics of a run, a mapping per step, and its model."""
    registry = Registry()
    run = Run(parse([*words, "--output", str(output)], registry), registry)
    run.train()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows, (output / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_turns_change_no_number_under_ray(tmp_path: Path, cluster: None, small: None, workers: int) -> None:
    words = ["ppo", "--model", "tiny", "--data", "prompts", "--reward", "length", "--batch-size", "4", "--steps", "2"]
    words += ["--sampling.max-new-tokens", "3", "--launcher", "ray", "--launcher.cpus", "0.1", "--report", "False"]
    words += ["--launcher.workers", str(workers)]
    apart, stayed = finish(words, tmp_path / "all")
    turns = ["--launcher.share-memory", "on", "--launcher.share-gib", f"{BUDGET!r}"]
    shared, woken = finish(words + turns, tmp_path / "turns")
    measured = ("time/", "speed/", "memory/", "sync/seconds", "sleep/")
    for a, b in zip(apart, shared, strict=True):
        assert {name: value for name, value in b.items() if not name.startswith(measured)} == {
            name: value for name, value in a.items() if not name.startswith(measured)
        }
        assert not any(name.startswith("sleep/") for name in a)
        for resident in ("actor", "critic", "reference", "rollout"):
            assert b[f"sleep/{resident}/gib"] > 0, "it slept and woke in every step"
    assert stayed == woken


def test_who_meets_in_a_bundle_takes_turns() -> None:
    seats = {
        "actor": (Seat(0, 0), Seat(0, 1)),
        "critic": (Seat(1, 0),),
        "reference": (Seat(0, 1), Seat(0, 2)),
        "engine": (Seat(0, 2),),
        "judge": (Seat(2, 0),),
    }
    assert neighbors(Layout(((), (), ()), ("PACK",) * 3, seats)) == [
        ["critic"],
        ["actor", "reference", "engine"],
        ["judge"],
    ]


def test_roles_share_their_gpu_though_another_place_has_none(small: None) -> None:
    """A place with `GPU=0` says nothing about the GPUs of the others."""
    registry = Registry()
    words = ["ppo", "--model", "tiny", "--data", "prompts", "--reward", "length", "--output", "unused"]
    plan = Run(parse(words, registry), registry).plan
    seats = {"actor": (Seat(0, 0),), "critic": (Seat(0, 0),), "reference": (Seat(1, 0),)}
    layout = Layout((({"GPU": 1.0},), ({"CPU": 1.0},)), ("PACK", "PACK"), seats)
    gpu = GIB + 3 * WORK  # less a context of half a GiB for each process: room for one role at work
    turns = RayTurns(SharingOptions(), plan, layout, {"actor": gpu, "critic": gpu, "reference": 0})
    assert turns.chains(list(seats)) == [["actor", "critic"], ["reference"]]
    assert turns._of.keys() == {"actor", "critic"}


def test_a_role_is_awake_while_it_sends_weights_to_engines_of_another_place() -> None:
    """Its states may be out of its device, since the critic of its place was trained last."""
    events: list[str] = []

    @contextmanager
    def turn(use: str) -> Iterator[None]:
        events.append(f"awake to {use}")
        yield
        events.append("done")

    def call(method: str, *_: Any) -> list[Shipment]:
        events.append(method)
        return [Shipment()]

    crew: Any = SimpleNamespace(call=call, limits=Limits(patience=1.0, stall=1.0))
    spec: Any = SimpleNamespace(name="actor")
    group = SharedRoleGroup(spec, crew, Shipper(), "unused")
    group.turn = turn  # type: ignore[assignment]
    group.send_weights([], 1)
    assert events == ["awake to read", "send_weights", "done"]
