"""Sampling ahead under Ray, on real engines: every token carries the version of the weights that sampled it.

Completions go on under new weights, so that updates fall into the middle of sequences. The weights of every version are kept,
and the log-probability of each token is computed again with those of its version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from rlhf_core import Registry, Run, hookimpl  # noqa: E402  after the checks above
from rlhf_core.config.builder import parse  # noqa: E402
from rlhf_core.training.local_role import LocalRole  # noqa: E402

STEPS = 6
ENGINES: dict[str, list[str]] = {"hf": [], "vllm": ["--rollout.kv-cache-gib", "0.25"]}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Watch:
    """The weights of each version, and the batches that were trained on."""

    def __init__(self) -> None:
        self.weights: dict[int, list[tuple[str, Any]]] = {}
        self.batches: list[Any] = []

    @hookimpl
    def rlhf_run_start(self, run: Run) -> None:
        self.weights[0] = list(run.roles["actor"].weights())

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> None:
        self.weights[step] = list(run.roles["actor"].weights())
        self.batches += run.samples.values()


@pytest.mark.parametrize("engine", ENGINES)
def test_every_token_has_the_version_that_sampled_it(engine: str, tmp_path: Path) -> None:
    if find_spec(engine if engine == "vllm" else "transformers") is None:
        pytest.skip("needs vllm beside ray")
    registry, watch = Registry(), Watch()
    registry.register(watch, name="watch")
    words = (
        f"grpo --model tiny --reward regex --reward.pattern .*[a-g].* --rollout {engine} --launcher ray --launcher.cpus 0.1 "
        "--ahead 1 --stale.most 4 --partial.tokens 3 --partial.surplus 2 --sampling.n 2 --sampling.max-new-tokens 12 "
        f"--batch-size 4 --steps {STEPS} --actor.optim.lr 3e-2 --algorithm.kl.coef 0 --output {tmp_path / 'run'}"
    )
    run = Run(parse([*words.split(), *ENGINES[engine]], registry), registry)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["rollout/span"] for row in rows) > 0, "an update fell into the middle of a completion"
    assert max(row["rollout/staleness_max"] for row in rows) <= 4
    role = LocalRole(run.plan, "actor", frozen=True)
    right, wrong = 0.0, 0.0
    for version, weights in watch.weights.items():
        role.load_weights(weights)
        for batch in watch.batches:
            mine_NT = batch.mask_NT & (batch["versions_NT"] == version)
            distance_NT = (
                role.infer(batch, frozenset({"logprobs_NT"}))["logprobs_NT"] - batch["sampler_logprobs_NT"]
            ).abs()
            right = max(right, float(distance_NT[mine_NT].max()) if mine_NT.any() else 0.0)
            others_NT = batch.mask_NT & ~mine_NT
            wrong = max(wrong, float(distance_NT[others_NT].max()) if others_NT.any() else 0.0)
    assert right < 2e-3, "float32 in another order, over a few layers"
    assert wrong > 0.1, "versions differ in their log-probabilities, so that a wrong one shows"
