"""The files a run leaves: metrics.jsonl, one object per step, and samples.jsonl, some completions of each step.

evaluation-metrics.jsonl gets the metrics of every evaluation when it is over, that before the first step included; each line is
forced to the disk.

On resume, lines of steps after the checkpoint are cut off first, so that no step occurs twice; of evaluations.jsonl, lines
of evaluations that the checkpoint does not know. A damaged line is set aside and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import hookimpl
from rlhf_core.util.atomic_files import force, write_bytes
from rlhf_core.util.jsonl import append_line, cut_lines
from rlhf_core.util.messages import log
from rlhf_core.util.secrets import redact_tree

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.run_view import RunView

__all__ = ["samples"]

EVALUATIONS = "evaluation-metrics.jsonl"
SAMPLES_PER_STEP = 4


@hookimpl
def rlhf_run_start(run: RunView) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_lines(run.output / name, lambda step: step <= run.step)
    _check_steps(run)
    evaluated = {step for step, _ in run.evaluations}
    for name in ("evaluations.jsonl", EVALUATIONS):
        cut_lines(run.output / name, evaluated.__contains__)
    lines = [json.dumps({"step": step, **metrics}) + "\n" for step, metrics in run.evaluations]
    if lines or (run.output / EVALUATIONS).exists():
        write_bytes(run.output / EVALUATIONS, "".join(lines).encode())  # as the checkpoint knows them


@hookimpl
def rlhf_step_end(run: RunView, step: int, metrics: Mapping[str, Any]) -> None:
    append_line(run.output / "metrics.jsonl", {"step": step, **metrics})
    for row in samples(run):
        append_line(run.output / "samples.jsonl", row)


@hookimpl
def rlhf_evaluated(run: RunView, step: int, metrics: Mapping[str, Any]) -> None:
    append_line(run.output / EVALUATIONS, {"step": step, **metrics})
    force(run.output / EVALUATIONS)


def _check_steps(run: RunView) -> None:
    """Warn if metrics.jsonl lacks steps before the checkpoint."""
    path = run.output / "metrics.jsonl"
    found = {json.loads(line)["step"] for line in path.read_bytes().split(b"\n")[:-1]} if path.exists() else set()
    if lost := sorted(set(range(1, run.step + 1)) - found):
        listed = ", ".join(map(str, lost[:8])) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        log.warning(f"{path} has no line for step {listed}")


def samples(run: RunView) -> Iterator[dict[str, Any]]:
    """Some rows of each batch of the last step, as plain values with the same names."""
    for key, batch in run.samples.items():
        for i in range(0, len(batch), max(1, len(batch) // SAMPLES_PER_STEP)):
            yield redact_tree({"step": run.step, "source": key, **sample_record(batch, i)})


def sample_record(batch: Batch, i: int) -> dict[str, Any]:
    """Row `i` as plain values: prompt, completion, row number, reward (None if abstained) and mean advantage."""
    row: dict[str, Any] = {"prompt": batch.prompts[i], "completion": (batch.raw_texts or batch.texts)[i]}
    if "row_N" in batch and batch["row_N"][i] >= 0:
        row["row"] = int(batch["row_N"][i])
    if "transcript" in batch.meta[i]:  # an episode: who wrote what
        row["transcript"] = batch.meta[i]["transcript"]
    if "rewards_N" in batch:
        abstained = "abstained_N" in batch and bool(batch["abstained_N"][i])
        row["reward"] = None if abstained else _six_digits(float(batch["rewards_N"][i]))
    if "advantages_NT" in batch:
        tokens = max(1, int(batch.mask_NT[i].sum()))
        row["advantage"] = _six_digits(float(batch["advantages_NT"][i].sum()) / tokens)
    return row


def _six_digits(value: float) -> float:
    """Six digits of it, however small it is: an importance weight can be 1e-9."""
    return float(f"{value:.6g}")
