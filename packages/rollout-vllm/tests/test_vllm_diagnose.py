"""`rlhf-run diagnose` finds no fault in vLLM, before and after new weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.vllm
def test_diagnose_does_not_accuse_vllm(tmp_path: Path) -> None:
    """The bound is the tightest that float32 keeps on this model, so that a stale or shifted weight would be named."""
    flags = ["--prompts", "4", "--tokens", "10", "--rollout.kv-cache-gib", "0.25", "--max-difference", "1e-5"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_core", "diagnose", "tiny", "--rollout", "vllm", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "as loaded: agree" in done.stdout and "after new weights: agree" in done.stdout
