"""An alarm on what reward hacking and collapse look like: KL, length or entropy leaving a band."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.hooks import hookimpl
from rlhf_core.contract.providers import Observer
from rlhf_core.errors import UsageError, option, run_option
from rlhf_core.util.jsonl import append_line, cut_lines
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["Alarm"]

Band = tuple[float, float]

METRICS = {"kl": "kl/mean", "length": "completion/length", "entropy": "completion/entropy", "reward": "reward/mean"}
"""Metric of each band, as in docs/metrics.md."""


@dataclass(frozen=True)
class Alarm(Observer):
    """Warns, or stops the run, when a metric has left its band for some steps; see OUTPUT/alarms.jsonl."""

    kl: Band | None = (-0.05, 0.5)
    """allowed range of the KL to the reference, in nats per token"""
    length: Band | None = None
    """allowed range of the mean length of completions, in tokens"""
    entropy: Band | None = (0.05, 20.0)
    """allowed range of the entropy of the sampled distribution, in nats per token"""
    reward: Band | None = None
    """allowed range of the mean reward"""
    more: Mapping[str, str] | None = None
    """further allowed ranges, by the metric's full name: loss/actor=-1:3"""
    patience: int = 3
    """number of consecutive steps outside the range before the alarm is raised"""
    action: Literal["warn", "stop"] = "warn"
    """reaction to an alarm: `warn` logs a warning and continues; `stop` saves the step and ends the run with exit code
    1"""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UsageError(f"patience must be at least 1, not {self.patience}")
        for metric, (least, greatest) in self.bands():
            if not least < greatest:
                raise UsageError(
                    f"the band of {metric} is {least:g} to {greatest:g}; the first number must be smaller than the "
                    "second"
                )
        if not list(self.bands()):
            raise UsageError(f"the alarm has no band; give one, for example {option('kl')} LEAST GREATEST")

    writes: ClassVar[tuple[str, ...]] = ("alarms.jsonl", "alarms.jsonl.damaged")

    def __call__(self, run: RunView) -> _Watch:
        return _Watch(self)

    def bands(self) -> Iterator[tuple[str, Band]]:
        """(metric, band) of everything watched."""
        for each in fields(self):
            if each.name in METRICS and getattr(self, each.name) is not None:
                yield METRICS[each.name], getattr(self, each.name)
        for metric, text in (self.more or {}).items():
            try:
                least, greatest = map(float, text.split(":"))
            except ValueError:
                raise UsageError(f"a band must be two numbers LEAST:GREATEST, not {text!r} for {metric}") from None
            yield metric, (least, greatest)


class _Watch:
    """Counts steps outside. One line when a metric leaves its band, and one when it is back."""

    def __init__(self, alarm: Alarm) -> None:
        self.alarm = alarm
        self._outside: dict[str, int] = {}

    @hookimpl
    def rlhf_run_start(self, run: RunView) -> None:
        for name in ("alarms.jsonl", "metrics.jsonl"):
            cut_lines(run.output / name, lambda step: step <= run.step)
        past = run.output / "metrics.jsonl"
        for line in past.read_bytes().splitlines() if past.is_file() else ():
            row = json.loads(line)
            list(self._count_step(row["step"], row))  # the count continues where it was

    @hookimpl
    def rlhf_step_end(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> str | None:
        alarms = []
        for metric, before, said in self._count_step(step, metrics):
            now, value = self._outside[metric], metrics[metric]
            if now == self.alarm.patience:
                alarms.append(said)
                append_line(run.output / "alarms.jsonl", {"step": step, "metric": metric, "value": value})
            elif not now and before >= self.alarm.patience:
                log.info(f"{metric} is back in its band at step {step}: {value:.4g}")
        if not alarms:
            return None
        if self.alarm.action == "stop":
            return f"{'; '.join(alarms)}; look at samples.jsonl, and continue with {run_option('resume', True)}"
        log.warning(f"alarm: {'; '.join(alarms)}; look at samples.jsonl")
        return None

    def _count_step(self, step: int, metrics: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
        """Count a step; for each metric watched: its name, how many steps it had been outside before, and the message."""
        for metric, (least, greatest) in self.alarm.bands():
            if metric not in metrics:
                continue
            before, value = self._outside.get(metric, 0), metrics[metric]
            inside = least <= value <= greatest  # nan is outside
            self._outside[metric] = now = 0 if inside else before + 1
            said = f"{metric} is {value:.4g}, outside {least:g} to {greatest:g}, since step {step - now + 1}"
            yield metric, before, said
