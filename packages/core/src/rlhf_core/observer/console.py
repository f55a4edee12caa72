"""Console output of a run: a header, a line per step with rates and the time left, and the result.

On a terminal and in a notebook a live display shows what happens inside a step (`rlhf_core.observer.live`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import hookimpl
from rlhf_core.errors import run_option
from rlhf_core.observer.live import LiveView, clock, make_view
from rlhf_core.util.messages import progress

if TYPE_CHECKING:
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.run_view import RunView

__all__ = ["Console", "evaluation_samples", "evaluation_table", "outcome", "step_line", "truncation"]


@hookimpl
def rlhf_watch(run: RunView) -> Console:
    """Show every run."""
    return Console(run)


class Console:
    """Shows a run, and measures how long its steps take."""

    def __init__(self, run: RunView) -> None:
        self.first, self.began = run.step, time.perf_counter()
        self.view: LiveView | None = None

    @hookimpl
    def rlhf_run_start(self, run: RunView) -> None:
        self.began = time.perf_counter()
        roles = ", ".join(f"{name}{'' if spec.trained else ' (frozen)'}" for name, spec in run.plan.roles.items())
        if run.step:
            _say(f"resumed at step {run.step} of {run.config.steps} in {run.output}")
        _say(f"{run.config.names['algorithm']} · model {run.config.model} · roles {roles} · output {run.output}")
        if run.plan.online:
            _say(truncation(run.config.sampling))
        self.view = make_view(run.config.steps, run.step)
        if self.view is not None:
            self.view.open()

    @hookimpl
    def rlhf_step_end(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> None:
        seconds = (time.perf_counter() - self.began) / max(1, step - self.first)
        line = step_line(step, run.config.steps, metrics, seconds * (run.config.steps - step))
        if self.view is None:
            _say(line)
        else:
            self.view.finish_step(step, line, "  ".join(outcome(metrics)), seconds)

    @hookimpl
    def rlhf_run_end(self, run: RunView, error: BaseException | None) -> None:
        if self.view is not None:
            self.view.close()
        if error is not None:
            return
        if len(run.evaluations) > 1:
            _say(evaluation_samples(run.output / "evaluations.jsonl"))
            _say(evaluation_table(run.evaluations[0], run.evaluations[-1]))
        _say(f"model saved in {run.output / 'model'}")


def truncation(sampling: Sampling) -> str:
    """Describe how truncated sampling affects importance ratios; empty if nothing is truncated or kept sets are replayed."""
    cuts = {"top-p": (sampling.top_p, 1.0), "top-k": (sampling.top_k, 0), "min-p": (sampling.min_p, 0.0)}
    cut = [f"{name} {value:g}" for name, (value, whole) in cuts.items() if value != whole]
    if not cut or sampling.temperature == 0 or sampling.replay == "on":
        return ""
    return (
        f"sampling is truncated by {', '.join(cut)}, but importance ratios use the whole distribution, which biases "
        "them (rollout/kept_mass is the share of probability that is kept); to use the truncated distribution, "
        f"pass {run_option('sampling.replay', 'on')}"
    )


def step_line(step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> str:
    """Return one line for a step: main metrics, speed, and time left."""
    shown = [f"step {step:>{len(str(steps))}}/{steps}", *outcome(metrics)]
    for name, label, form in (("kl/mean", "kl", "z.4f"), ("completion/length", "length", ".0f")):
        if name in metrics:
            shown.append(f"{label} {metrics[name]:{form}}")
    shown += [f"{name} {value:z.4f}" for name, value in metrics.items() if name.startswith("loss/")]
    rates = {name.removeprefix("lr/"): value for name, value in metrics.items() if name.startswith("lr/")}
    shown += [f"lr {value:.2g}" if len(rates) == 1 else f"lr/{role} {value:.2g}" for role, value in rates.items()]
    if "data/epoch" in metrics:
        shown.append(f"epoch {metrics['data/epoch']:.2f}")
    shown.append(f"{metrics['tokens'] / max(metrics['time/step'], 1e-9):.0f} tokens/s")
    shown.append(f"{clock(seconds_left)} left")
    return "  ".join(shown)


def outcome(metrics: Mapping[str, Any]) -> list[str]:
    """Return what a step is judged by: the reward with its standard deviation, or accuracy and margin of pairs."""
    shown = []
    if "reward/mean" in metrics:
        spread = f" ± {math.sqrt(max(0.0, metrics['reward/variance'])):.3f}" if "reward/variance" in metrics else ""
        shown.append(f"reward {metrics['reward/mean']:+.3f}{spread}")
    for name, value in metrics.items():
        role, _, last = name.rpartition("/")
        if last in ("accuracy", "margin") and f"loss/{role}" in metrics:
            shown.append(f"{last} {value:.3f}")
    return shown


def evaluation_table(before: tuple[int, Mapping[str, float]], after: tuple[int, Mapping[str, float]]) -> str:
    """Evaluations at the first and the last step side by side, with standard errors where there are any."""
    rows: list[tuple[str, ...]] = [("", f"step {before[0]}", f"step {after[0]}", "difference")]
    for name, value in before[1].items():
        if name.endswith("_se") or name not in after[1]:
            continue
        errors = [metrics.get(f"{name}_se") for metrics in (before[1], after[1])]
        cells = [
            f"{number:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            for number, error in zip((value, after[1][name]), errors, strict=True)
        ]
        rows.append((name.removeprefix("eval/"), *cells, f"{after[1][name] - value:+.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def evaluation_samples(path: Path) -> str:
    """Format the answers to the same prompts at the first and the last evaluation."""
    if not path.exists():
        return ""
    rows = [row for line in path.read_bytes().split(b"\n")[:-1] if (row := _shown_row(line)) is not None]
    if not rows:
        return ""
    first, last = ({r["prompt"]: r for r in rows if r["step"] == step} for step in (rows[0]["step"], rows[-1]["step"]))
    shown = []
    for prompt in (prompt for prompt in first if prompt in last):
        shown.append(f"prompt: {_one_line(first[prompt].get('question', prompt))}")
        pair = (first[prompt], last[prompt])
        shown += [f"  step {row['step']} ({_reward(row)}): {_one_line(row['completion'])}" for row in pair]
    return "\n".join(shown)


def _shown_row(line: bytes) -> dict[str, Any] | None:
    """Return what was answered to a prompt; None for a line of another kind, or a damaged one: the run is over and saved."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row.keys() >= {"step", "prompt", "completion", "reward"} else None


def _reward(row: Mapping[str, Any]) -> str:
    return "abstained" if row["reward"] is None else f"{row['reward']:+.2f}"


def _one_line(text: str, width: int = 200) -> str:
    """`text` without line breaks, cut where it is too long for a terminal's line or two."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _say(text: str) -> None:
    if text:
        progress.info(text)
