"""Fewer prompts than workers and engines: those without one change no number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from safetensors.torch import load_file  # noqa: E402  after the checks above

from rlhf_core import Registry, Run  # noqa: E402
from rlhf_core.config.builder import parse  # noqa: E402

TOLERANCE = 1e-4
APART = ("time/", "speed/", "memory/", "sync/", "padding")
DEEPSPEED = ["--strategy", "deepspeed", "--strategy.stage", "3"]
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed beside ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def finish(output: Path, flags: list[str]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Return the metrics of a run with one prompt per step, and its weights."""
    words = ["ppo", "--model", "tiny", "--data", "prompts", "--reward", "length", "--batch-size", "1", "--steps", "2"]
    words += ["--minibatches", "1", "--sampling.n", "3", "--sampling.max-new-tokens", "5", "--report", "False"]
    words += [
        "--sampling.top-p",
        "0.8",
        "--actor.optim.lr",
        "1e-3",
        "--evaluator",
        "heldout",
        "--evaluator.prompts",
        "1",
    ]
    registry = Registry()
    run = Run(parse([*words, *flags, "--output", str(output)], registry), registry)
    run.train()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], dict[str, Any]]:
    return finish(tmp_path_factory.mktemp("alone") / "run", [])


@pytest.mark.parametrize(
    "flags",
    [["--launcher.engines", "3"], pytest.param(DEEPSPEED, marks=[WITH_DEEPSPEED, pytest.mark.slow])],
    ids=["torch", "deepspeed"],
)
def test_two_workers_train_on_one_prompt(flags: list[str], alone: Any, tmp_path: Path) -> None:
    placed = ["--launcher", "ray", "--launcher.cpus", "0.1", "--launcher.workers", "2"]
    metrics, weights = finish(tmp_path / "run", [*placed, *flags])
    assert len(metrics) == len(alone[0]) == 2
    for found, expected in zip(metrics, alone[0], strict=True):
        names = [name for name in expected if not name.startswith(APART)]
        assert {n: found[n] for n in names} == {
            n: pytest.approx(expected[n], abs=TOLERANCE, rel=TOLERANCE) for n in names
        }
    assert max(float((weights[name] - alone[1][name]).abs().max()) for name in alone[1]) < TOLERANCE
