"""Plugins of `-p`, which live in a folder rather than in the environment, are known to every worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")

from rlhf_core.cli.app import main  # noqa: E402  after the check above
from rlhf_core.config.builder import parse, to_names  # noqa: E402
from rlhf_core.plugins.registry import Registry  # noqa: E402
from rlhf_distributed_ray.worker import Description, plan_from, versions  # noqa: E402


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The run is started where the module is; nothing else says where to find it."""
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(Path(__file__).parent)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    yield
    for name in ("ray_after", "ray_optimizer"):
        sys.modules.pop(name, None)


SMALL = "--model tiny:hidden=16,layers=1 --steps 3 --batch-size 4".split()
SMALL += ["--sampling.n", "2", "--sampling.max-new-tokens", "4", "--data", "prompts"]
RUN = ["-p", "ray_after", "after_judge", *SMALL]
PLACED = ["--launcher", "ray", "--launcher.cpus", "0.1"]


def trained(words: list[str], output: Path, *flags: str) -> list[dict[str, Any]]:
    """The metrics of a run, but for seconds and transfers."""
    assert main([*words, "--output", str(output), *flags]) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    apart = ("time/", "speed/", "memory/", "sync/", "padding", "recovered/")
    return [{name: value for name, value in row.items() if not name.startswith(apart)} for row in rows]


def test_an_algorithm_of_a_local_module_has_the_numbers_of_one_process_under_ray(tmp_path: Path) -> None:
    """Its policy is credited by the new weights of a role that other workers hold."""
    local = trained(RUN, tmp_path / "local")
    before = trained(RUN, tmp_path / "before", "--algorithm.after", "")
    placed = trained(RUN, tmp_path / "ray", *PLACED)
    assert len(placed) == len(local) == 3
    for ours, theirs, earlier in zip(placed, local, before, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in theirs.items()}
        assert abs(theirs["loss/actor"] - earlier["loss/actor"]) > 1e-3, "the order of updates shows in the loss"


def test_a_worker_loads_and_blocks_the_plugins_of_the_controller() -> None:
    registry = Registry(load=["ray_after"], blocked=["files"])
    config = parse(RUN[2:], registry)
    plan = plan_from(
        Description(registry.selection, to_names(config), versions(registry, config.names, config.uses), ".")
    )
    assert set(plan.roles) == {"actor", "judge"}
    assert plan.config.registry is not None and plan.config.registry is not registry
    assert plan.config.registry.plugins == registry.plugins and "files" not in registry.plugins


def test_an_optimizer_that_observes_and_evaluates_a_step_again_has_the_numbers_of_one_process(tmp_path: Path) -> None:
    """Sums and the second evaluation are those of both workers together; the entropy of all tokens scales the step."""
    words = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", *SMALL, "--advantage", "ray_after:Rewarded"]
    words += ["--actor.optim.use", "ray_optimizer:Lookahead"]
    local = trained(words, tmp_path / "local")
    placed = trained(words, tmp_path / "ray", *PLACED, "--launcher.workers", "2")
    for ours, theirs in zip(placed, local, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in theirs.items()}
    assert abs(local[0]["loss/actor"] - local[2]["loss/actor"]) > 1e-3, "it learns"
