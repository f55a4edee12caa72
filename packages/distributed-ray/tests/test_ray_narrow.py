"""Runs in bfloat16 send their engines half the bytes of those in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")

from rlhf_core import Registry, Run  # noqa: E402  after the check above
from rlhf_core.config.builder import parse  # noqa: E402

JOB = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm --model tiny:hidden=64,layers=2,vocab=2000 --reward length"
JOB += " --steps 2 --batch-size 2 --sampling.n 2 --sampling.max-new-tokens 4 --launcher ray --launcher.cpus 0.1"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def rows(dtype: str, output: Path) -> list[dict[str, Any]]:
    registry = Registry()
    Run(parse([*JOB.split(), "--dtype", dtype, "--output", str(output)], registry), registry).train()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_sync_of_a_run_in_bfloat16_is_half_as_large(tmp_path: Path) -> None:
    """The independent source is the count of the model's numbers: 5 norms of 64 are vectors, which keep their precision."""
    wide, half = (rows(dtype, tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    matrices = 2000 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert wide[0]["sync/bytes"] == 4 * (matrices + 5 * 64)
    assert half[0]["sync/bytes"] == 2 * matrices + 4 * 5 * 64
    assert all(row["actor/mismatch"] < 1e-2 for row in half), "the engine has what the trainer computes with"
