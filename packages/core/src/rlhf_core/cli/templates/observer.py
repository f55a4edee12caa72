"""Template of `new-plugin --kind observer`: an observer and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --observer $name --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_core import Observer, RunView, hookimpl


@dataclass(frozen=True)
class $cls(Observer):
    """Ends a run when a metric reaches a value."""

    metric: str = "reward/mean"
    """full name of the metric, as in metrics.jsonl"""
    value: float = float("inf")
    """value at which the run ends"""

    def __call__(self, run: RunView) -> object:
        return _Watcher(self)


class _Watcher:
    """The watcher of one run."""

    def __init__(self, options: $cls) -> None:
        self.options = options

    @hookimpl
    def rlhf_step_end(self, metrics: Mapping[str, float]) -> bool:
        return metrics.get(self.options.metric, float("-inf")) >= self.options.value


@hookimpl
def rlhf_observer() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_observer

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_observer($cls())
"""
