"""Peak memory of a run on CPUs, beside its forecast: the check of a strategy's `memory`, and of a model that is planned.

    from rlhf_core.testing import compare_memory

    def test_the_forecast_is_within_a_tenth(tmp_path: Path) -> None:
        found, measured = compare_memory("sft", tmp_path, ranks=2, model="tiny", strategy="my-strategy")
        assert found == pytest.approx(measured, rel=0.1)

The measure is what torch's CPU allocator reports to `torch.profiler`. Memory that libraries hold outside of it is not seen.
The profiler sees what is freed by the threads that it watches, and gloo's are none of them. So each rank waits for a moment
after a collective call, until gloo's thread has let go of its tensors.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig

__all__ = ["compare_memory"]

PAUSE_SECONDS = 0.003
"""Time that gloo's thread has to let go of a call's tensors."""

FRAME = 19
"""Tokens that the template of `tiny` puts around a prompt."""


def compare_memory(
    algorithm: Any,
    folder: Path,
    *,
    ranks: int = 1,
    rows: int = 8,
    prompt: int = 64,
    completion: int = 64,
    pairs: bool = False,
    seconds: float = 300.0,
    **options: Any,
) -> tuple[int, int]:
    """Return the forecast and the measured peak bytes of a device, in a run of two steps on rows of equal length.

    Args:
        algorithm: its name, or a table with its options, as `make_config` takes it.
        folder: an empty folder for outputs.
        ranks: number of processes, on CPUs with gloo; the largest peak counts.
        rows: prompts, or rows of data, of a step.
        prompt: bytes of a prompt, which are the tokens of `tiny`; its template adds more.
        completion: tokens of a completion, the end included.
        pairs: rows of data have a chosen and a rejected completion.
        seconds: limit of the run on several ranks.
        options: options of the run.

    Raises:
        AssertionError: a rank failed, or did not end in time.
    """
    from rlhf_core.forecast.forecast import forecast
    from rlhf_core.forecast.options import PlanOptions

    asked = (algorithm, prompt, completion, rows, pairs, str(folder / "run"), options)
    lengths = PlanOptions(gpus=ranks, prompt_tokens=prompt + FRAME, completion_tokens=completion)
    found = forecast(_config(*asked), lengths).peak
    if ranks == 1:
        return found, _peak_bytes(_config(*asked))
    done = run_ranks(ranks, _measure_rank, folder, asked, seconds=seconds)
    assert not any(rank.code for rank in done), "\n".join(rank.stderr[-2000:] for rank in done)
    return found, max(int((folder / f"peak-{rank}").read_text()) for rank in range(ranks))


def _config(
    algorithm: Any, prompt: int, completion: int, rows: int, pairs: bool, output: str, options: dict[str, Any]
) -> RunConfig:
    """Return a run on rows of exactly these lengths; on prompts alone if there is a reward."""
    from rlhf_core.config.builder import make_config

    answer = "b" * (completion - 1)
    columns = {} if "reward" in options else dict.fromkeys(("chosen", "rejected") if pairs else ("completion",), answer)
    data = [{"prompt": "a" * prompt, **columns} for _ in range(rows)]
    return make_config(algorithm, data=data, steps=2, batch_size=rows, output=output, **options)


def _measure_rank(folder: Path, asked: tuple[Any, ...]) -> None:
    """Run a rank, and write its peak."""
    import os

    work: Any = torch.distributed.Work
    wait = work.wait

    def wait_longer(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = wait(self, *args, **kwargs)
        time.sleep(PAUSE_SECONDS)
        return found

    work.wait = wait_longer  # in this process alone, which ends with the run
    peak = _peak_bytes(_config(*asked))
    (folder / f"peak-{os.environ['RANK']}").write_text(str(peak))


def _peak_bytes(config: RunConfig) -> int:
    """Return the most bytes that torch's CPU allocator held at a time in a run."""
    from torch.profiler import ProfilerActivity, profile

    from rlhf_core.run.run import Run

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        Run(config).train()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
