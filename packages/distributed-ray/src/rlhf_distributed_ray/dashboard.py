"""`--observer ray_dashboard`: a run's metrics among those of its Ray cluster, which the dashboard and Prometheus read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.providers import Observer
from rlhf_core.errors import MissingPackage, UsageError, run_option
from rlhf_core.observer.tracker import Tracker

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["RayDashboard"]


@dataclass(frozen=True)
class RayDashboard(Observer):
    """Each metric as a gauge of Ray, `rlhf_` and its name, with the run's folder as the tag `run`."""

    def check(self) -> None:
        """Raise UsageError if Ray is not installed."""
        if find_spec("ray") is None:
            raise MissingPackage("observer ray_dashboard needs ray: python3 -m pip install 'rlhf-distributed-ray[ray]'")

    def __call__(self, run: RunView) -> Tracker:
        import ray

        if not ray.is_initialized():
            raise UsageError(f"observer ray_dashboard needs a Ray cluster; add {run_option('launcher', 'ray')}")
        return _Gauges(str(run.output))


class _Gauges(Tracker):
    """Sets one gauge per metric."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from ray.util.metrics import Gauge

        for name, value in {**metrics, "step": step}.items():
            if name not in self._gauges:
                title = "rlhf_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(title, description=f"{name} of a run", tag_keys=("run",))
            self._gauges[name].set(float(value), tags={"run": self._run})
