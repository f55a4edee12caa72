"""Reward models that are roles with workers of their own: their scores are those of one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")

from rlhf_core import Registry, Run  # noqa: E402  after the check above
from rlhf_core.config.builder import parse  # noqa: E402

MODEL = "tiny:hidden=16,layers=1"
JOB = f"rlhf_core.testing.tiny_algorithm:TinyAlgorithm --model {MODEL} --batch-size 2"
JOB += " --sampling.n 2 --sampling.max-new-tokens 4"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def run_of(words: str, output: Path) -> Run:
    registry = Registry()
    return Run(parse([*words.split(), "--output", str(output)], registry), registry)


def scorer(seed: int, folder: Path) -> str:
    """A folder with a reward model."""
    run = run_of(f"{JOB} --reward model_role --reward-model.model {MODEL},seed={seed}", folder / "run")
    with run.place():
        run.roles["reward_model"].export(str(folder / "model"))
    return str(folder / "model")


def rewards(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name.startswith("reward/")} for row in rows]


@pytest.mark.slow
def test_two_reward_models_score_beside_each_other_as_in_one_process(tmp_path: Path) -> None:
    first, second = (scorer(seed, tmp_path / str(seed)) for seed in (3, 5))
    words = f"{JOB} --steps 2 --reward model_roles --reward.weights 2 -0.5"
    words += f" --reward-model.model {first} --reward-model-2.model {second}"
    run_of(words, tmp_path / "one").train()
    placed = run_of(f"{words} --launcher ray --launcher.cpus 0.1 --launcher.place separate", tmp_path / "ray")
    placed.train()
    expected = rewards(tmp_path / "one")
    assert all(row["reward/reward_model"] != row["reward/reward_model_2"] for row in expected)
    assert rewards(tmp_path / "ray") == [pytest.approx(row, abs=1e-5) for row in expected]
    assert placed.placed is not None and placed.placed.rollout is not None
    chains = placed.placed.cluster.layout.chains(["reward_model", "reward_model_2"])  # type: ignore[attr-defined]
    assert chains == [["reward_model"], ["reward_model_2"]], "no device in common, so that they work at once"
