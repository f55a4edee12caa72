"""Code that runs inside an actor, as plain Python in this process."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.engines import OpenContext
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Rollout
from rlhf_core.contract.registry_view import PluginSelection
from rlhf_core.errors import UsageError
from rlhf_core.testing import tiny_run
from rlhf_core.testing.tiny import tiny_rollouts
from rlhf_core.training.local_role import LocalRole
from rlhf_distributed_ray import worker as worker_module
from rlhf_distributed_ray.arrays import buckets
from rlhf_distributed_ray.engine_worker import EngineWorker, MirrorRole
from rlhf_distributed_ray.worker import Description, RoleWorker, package_versions, plan_from

LOGPROBS = frozenset({"logprobs_NT"})


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan: Plan = tiny_run(tmp_path / "run", seed=5).plan
    return plan


def described(folder: str) -> Description:
    """A run whose plan the test gives."""
    return Description(PluginSelection(), {}, {}, folder)


def test_a_worker_goes_where_the_run_was_started_or_says_that_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "plan_from", lambda *_: None)
    monkeypatch.chdir("/")
    assert RoleWorker(described(str(tmp_path)), "actor", 0, 1).initialize() == (socket.gethostname(), os.getpid())
    assert Path.cwd() == tmp_path
    with pytest.raises(
        UsageError, match=r"^node .* has no folder /not/here \(No such .*\); start the run in a folder that"
    ):
        RoleWorker(described("/not/here"), "actor", 0, 1).initialize()


def test_a_worker_with_other_versions_than_the_controller_says_which_before_it_reads_the_run() -> None:
    mine = package_versions(["torch", "rlhf-core", "no-such-package"])
    assert mine == {
        "torch": torch.__version__.partition("+")[0],
        "rlhf-core": metadata.version("rlhf-core"),
        "no-such-package": "none",
    }
    run = Description(
        PluginSelection(), {"algorithm": "of another version"}, {}, ".", {}, {**mine, "torch": "1.0", "peft": "0.1"}
    )
    has_peft = package_versions(["peft"])["peft"]
    with pytest.raises(UsageError) as caught:
        plan_from(run)
    assert str(caught.value) == (
        f"packages of {socket.gethostname()} differ from the controller's (torch: 1.0 here, {mine['torch']} there, "
        f"peft: 0.1 here, {has_peft} there); install the same versions"
    )


def started(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> RoleWorker:
    """The only worker of the actor."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    worker = RoleWorker(described("."), "actor", 0, 1)
    worker.plan = plan
    worker.start("localhost", 1, 60.0)
    return worker


def test_a_worker_draws_from_the_runs_seed_and_goes_on_where_a_checkpoint_was(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout of adapters draws there."""
    with torch.random.fork_rng():
        worker = started(plan, monkeypatch)
        first = torch.get_rng_state()
        torch.rand(3)
        started(plan, monkeypatch)
        assert torch.equal(torch.get_rng_state(), first), "by nothing but the seed"
        worker.save(str(tmp_path))
        ahead = torch.rand(3)
        worker.load(str(tmp_path))
        assert torch.equal(torch.rand(3), ahead)
        for name in ("random-0.safetensors",):  # a folder that one process wrote has none
            (tmp_path / name).unlink()
        worker.load(str(tmp_path))


def test_a_model_that_an_engine_was_only_compared_with_is_freed_and_built_again_with_the_weights_of_the_sync(
    plan: Plan,
) -> None:
    mirror, trained, batch = MirrorRole(plan, "actor"), LocalRole(plan, "actor"), tiny_rollouts()
    before = mirror.infer(batch, LOGPROBS)["logprobs_NT"]
    mirror.release()
    assert "local" not in mirror.__dict__
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    for k, bucket in enumerate(buckets(trained.weights())):
        mirror.receive(bucket, first=k == 0)
    mirror.publish(1)
    for _ in range(2):
        after = mirror.infer(batch, LOGPROBS)["logprobs_NT"]
        torch.testing.assert_close(after, trained.infer(batch, LOGPROBS)["logprobs_NT"])
        mirror.release()
    assert (after - before).abs().max() > 0.01


def test_a_model_that_is_sampled_from_or_alone_has_the_weights_stays(plan: Plan) -> None:
    mirror, trained = MirrorRole(plan, "actor"), LocalRole(plan, "actor")
    assert mirror.causal_lm is mirror.module.causal_lm
    mirror.release()
    assert "local" in mirror.__dict__
    other = MirrorRole(plan, "actor")
    other.infer(tiny_rollouts(), LOGPROBS)
    for k, bucket in enumerate(buckets(trained.weights())):
        other.receive(bucket, first=k == 0)
    other.publish(1)
    other.release()
    assert "local" in other.__dict__


def published(mirror: MirrorRole, weights: list[tuple[str, torch.Tensor]], version: int) -> threading.Thread:
    """A thread in which they are published; it has a moment to do so."""
    for k, bucket in enumerate(buckets(iter(weights))):
        mirror.receive(bucket, first=k == 0)
    thread = threading.Thread(target=mirror.publish, args=(version,))
    thread.start()
    thread.join(0.2)
    return thread


def test_weights_that_arrive_during_a_call_wait_for_the_end_of_a_forward_pass_and_change_all_at_once(
    plan: Plan,
) -> None:
    mirror = MirrorRole(plan, "actor")
    first = [(name, tensor.clone()) for name, tensor in mirror.weights()]
    later = {version: [(name, tensor + version) for name, tensor in first] for version in (1, 2)}

    def assert_has(weights: list[tuple[str, torch.Tensor]], version: int) -> None:
        assert mirror.version == version
        for (name, expected), (_, found) in zip(weights, mirror.local.weights(), strict=True):
            torch.testing.assert_close(found, expected, msg=name)

    with mirror.gathered():
        assert mirror.refresh() == 0
        waiting = published(mirror, later[1], 1)
        assert waiting.is_alive()
        assert_has(first, 0)
        assert mirror.refresh() == 1
        waiting.join(60)
        assert not waiting.is_alive()
        assert_has(later[1], 1)
        last = published(mirror, later[2], 2)
        assert last.is_alive()
        assert_has(later[1], 1)
    last.join(60)
    assert not last.is_alive(), "the end of the call is the end of its last forward pass"
    assert_has(later[2], 2)
    assert not published(mirror, first, 3).is_alive(), "nothing is sampled, so nothing is waited for"
    assert_has(first, 3)


@dataclass(frozen=True)
class Buffered(Rollout):
    """An engine that remembers the versions it has taken, and is closed."""

    def open(self, context: OpenContext) -> BufferedEngine:
        return BufferedEngine(context)


class BufferedEngine(Rollout):
    def __init__(self, context: OpenContext) -> None:
        self.context, self.versions, self.open_ = context, [], True

    def sync(self, role: Any) -> Mapping[str, float]:
        assert self.context.roles["actor"] is role and self.context.world.size == 1
        self.versions.append(role.version)
        return {}

    def close(self) -> None:
        self.open_ = False

    def state_dict(self) -> Mapping[str, Any]:
        return {"versions": self.versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.versions = list(state["versions"])


def bring(worker: EngineWorker, version: int) -> None:
    worker.receive("actor", version, 0, [])
    worker.finish_sync("actor", version, version, 1)


def test_the_worker_of_a_rollout_engine_opens_it_stores_its_state_and_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "plan_from", lambda *_: tiny_run(tmp_path / "run", rollout=Buffered()).plan)
    monkeypatch.chdir(tmp_path)
    worker, later = EngineWorker(described(".")), EngineWorker(described("."))
    worker.initialize()
    for version in (1, 2):
        bring(worker, version)
        bring(worker, version)
    later.initialize()
    later.load_state_dict(worker.state_dict())
    bring(later, 3)
    assert later.state_dict() == {"rollout": {"versions": [1, 1, 2, 2, 3]}}, "a sync that comes twice is one"
    engine = worker.engine
    worker.close()
    assert not engine.open_
    assert later.engine.open_, "each worker has an engine of its own"
