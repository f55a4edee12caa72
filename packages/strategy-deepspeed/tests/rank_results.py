"""Results of ranks beside those of one process: starting the ranks, reading what they left, and comparing it.

The reference is core's own loop and strategy in this process, in float32. The ranks are real processes on gloo.
"""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed_ranks as ranks
import torch

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

Result = dict[str, Any]

APART = ("time/", "speed/", "memory/", "padding", "actor/accuracy")
"""Metrics that may differ: seconds and bytes; which rows share a micro-batch; and, in the first step of dpo, how many margins
are above zero, since policy and reference are the same model and every margin is rounding."""


def launch(folder: Path, size: int, words: list[str], seconds: float = 900.0) -> None:
    """Run the words of `deepspeed_ranks` on `size` ranks."""
    ranks.write_data(folder)
    done = run_ranks(size, ranks.main, folder, *words, seconds=seconds)
    assert not any(rank.code for rank in done), "\n".join(rank.stderr[-3000:] for rank in done if rank.code)


@cache
def reference(case: str) -> Result:
    """Return the numbers of a case under plain torch in this process."""
    with tempfile.TemporaryDirectory() as folder:
        ranks.write_data(Path(folder))
        return ranks.run(Path(folder), case, TorchStrategy("cpu"), case)


def outcome(folder: Path, word: str) -> Result:
    """Return the outcome of the run named `word`."""
    result: Result = torch.load(folder / f"{word.replace(':', '-')}.pt", weights_only=False)
    return result


def assert_same(found: Result, expected: Result, tolerance: float) -> None:
    """Metrics of every step, completions and final weights agree."""
    assert found["sampled"] == expected["sampled"]
    assert [row["step"] for row in found["metrics"]] == [row["step"] for row in expected["metrics"]]
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        names = {name for name in theirs if not name.startswith(APART)}
        assert names == {name for name in ours if not name.startswith(APART)}
        for name in names:
            assert math.isclose(ours[name], theirs[name], rel_tol=tolerance, abs_tol=tolerance), (ours["step"], name)
    assert found["weights"].keys() == expected["weights"].keys()
    for role, weights in expected["weights"].items():
        for name, tensor in weights.items():
            torch.testing.assert_close(found["weights"][role][name], tensor, rtol=0.0, atol=tolerance)


def assert_resumes(whole: Result) -> None:
    """The run that was resumed in its middle gave the very same numbers."""
    assert_same(whole["resumed"], second_half(whole), tolerance=1e-7)


def assert_continues(found: Result, whole: Result) -> None:
    """The second half of a run under another layout is that of the run itself."""
    assert_same(found, second_half(whole), tolerance=1e-5)


def second_half(whole: Result) -> Result:
    """Return what the steps after the checkpoint gave."""
    half = {
        key: whole[key][len(whole[key]) // 2 :] for key in ("metrics", "sampled")
    }  # a step may sample several times
    return {**whole, **half}


def assert_transformers_loads(folder: Path, word: str) -> None:
    """Plain transformers reads the exported model with its last weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / word.replace(":", "-") / "model")
    weights = outcome(folder, word)["weights"]["actor"]
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
