"""The state of a run between two steps: exactly what a checkpoint holds in addition to roles and random states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_core.training.running_moments import Moments

if TYPE_CHECKING:
    from rlhf_core.training.kl import KLController

__all__ = ["RunState"]


READERS = "readers"
"""Key in a position of the data: the states of readers, which are stored with those of other engines."""


@dataclass
class RunState:
    """State of a run after its steps so far."""

    kl: KLController | None = None
    """the KL coefficient in force and the rule that moves it; None without a penalty"""
    step: int = 0
    """finished steps"""
    stream: dict[str, Any] = field(default_factory=dict)
    """position of the data after the last finished step (`Stream.state_dict`), with the states of readers that have one"""
    moments: dict[str, Moments] = field(default_factory=dict)
    """running mean and deviation of all rewards so far, by source, if an algorithm normalizes by them"""
    versions: dict[str, int] = field(default_factory=dict)
    """optimizer steps of each trained role; of one that tracks another, those of the other when it took its weights"""
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(step, metrics) of every evaluation"""
    last_metrics: dict[str, float] = field(default_factory=dict)
    """metrics of the last finished step"""

    @property
    def kl_coef(self) -> float:
        """The KL coefficient in force; 0 without a penalty."""
        return self.kl.coef if self.kl is not None else 0.0

    @property
    def readers(self) -> Mapping[str, Any]:
        """The states of readers by place, as of the last finished step; what is read ahead has not changed them."""
        states: Mapping[str, Any] = self.stream.get(READERS, {})
        return states

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data that JSON can hold; without `readers`, which are rank by rank."""
        return {
            "step": self.step,
            "stream": {name: value for name, value in self.stream.items() if name != READERS},
            "kl_coef": self.kl_coef,
            "moments": {source: moments.state() for source, moments in self.moments.items()},
            "versions": dict(self.versions),
            "metrics": dict(self.last_metrics),
            "evaluations": list(self.evaluations),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.step = state["step"]
        self.stream = dict(state["stream"])
        if self.kl is not None:
            self.kl.coef = state["kl_coef"]
        self.moments = {source: Moments(*moments) for source, moments in state["moments"].items()}
        self.versions = dict(state["versions"])
        self.last_metrics = dict(state["metrics"])
        self.evaluations = [(step, metrics) for step, metrics in state["evaluations"]]
