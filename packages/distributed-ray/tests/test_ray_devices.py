"""GPU assignment of workers on a simulated machine with four: Ray counts devices whether there are any or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from rlhf_core import Registry  # noqa: E402  after the checks above
from rlhf_core.config.builder import parse  # noqa: E402
from rlhf_core.training.planner import make_plan  # noqa: E402

RUN = "grpo --model tiny --data prompts --reward length --batch-size 4 --rollout fake --strategy fake".split()
RUN += "--launcher ray --launcher.cpus 0.1".split()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Four GPUs by its own account."""
    for attempt in range(5):
        try:
            gpus: dict[str, Any] = {"num_cpus": 8, "num_gpus": 4, "include_dashboard": False}
            ray.init("local", **gpus, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as error:  # Ray gives a node 30 s to start, which is little beside much other work
            if attempt == 4 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    yield
    ray.shutdown()


def visible(flags: str, tmp_path: Any, variable: str = "CUDA_VISIBLE_DEVICES") -> dict[str, list[str]]:
    """An environment variable of each rank of each role and of each engine."""
    deadline = time.monotonic() + 120  # until the placement groups of the run before are given back
    while ray.available_resources().get("GPU", 0.0) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    config = parse([*RUN, *flags.split(), "--output", str(tmp_path / "run")], Registry())

    def look(self: object) -> str:
        import os

        return os.environ.get(variable, "unset")

    placed: Any = config.providers["launcher"](make_plan(config))
    try:
        groups = {**placed.roles, "engine": placed.rollout}
        return {n: ray.get([actor.__ray_call__.remote(look) for actor in g.crew.actors]) for n, g in groups.items()}
    finally:
        placed.close()


@pytest.mark.parametrize("workers", ["2", "1x2"])
def test_together_rank_k_of_every_role_and_engine_k_are_on_a_gpu_of_their_own(workers: str, tmp_path: Any) -> None:
    """Ray by itself packs shares: two ranks of a role were on one GPU, which NCCL refuses."""
    found = visible(f"--launcher.workers {workers}", tmp_path)
    assert len(set(found["actor"])) == 2 and "" not in found["actor"]
    assert found["actor"] == found["reference"] == found["engine"]


def test_a_secret_reaches_every_worker_past_what_ray_shows(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    found = visible("--launcher.place actor+reference@1", tmp_path, "HF_TOKEN")
    assert found == {"actor": ["hf_0123456789"], "reference": ["hf_0123456789"], "engine": ["hf_0123456789"]}
    assert "hf_0123456789" not in str(ray._private.worker.global_worker.runtime_env), "of the job"
    assert not [actor for actor in ray._private.state.actors().values() if "hf_0123456789" in str(actor)]


def test_a_partition_has_the_gpus_that_it_names(tmp_path: Any) -> None:
    found = visible("--launcher.place actor@2,reference@1,GPU=0,engine@1,GPU=2", tmp_path)
    assert found["reference"] == [""] and len(found["engine"][0].split(",")) == 2
    assert len({*found["actor"], *found["engine"][0].split(",")}) == 4


def test_without_gpus_nobody_sees_one(tmp_path: Any) -> None:
    """Ray by itself leaves all GPUs visible to who asks for none, and every worker would take the first."""
    assert visible("--launcher.gpus off", tmp_path) == {"actor": [""], "reference": [""], "engine": [""]}
