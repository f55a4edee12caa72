"""MLflow: `--observer mlflow`, then `mlflow ui --backend-store-uri sqlite:///OUTPUT/mlflow.db`.

Credentials of a tracking server are MLflow's own affair (MLFLOW_TRACKING_USERNAME and the like); there is no option for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.contract.providers import Observer
from rlhf_core.observer.tracker import Tracker, needs_package, options_of_run, tracker_run_id

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["MLflow"]

TAG = "rlhf.run"
"""Tag of a run that holds the id by which a resumed run finds it."""


@dataclass(frozen=True)
class MLflow(Observer):
    """A run of MLflow: every metric, and the options as parameters. In OUTPUT/mlflow.db, or at MLFLOW_TRACKING_URI."""

    experiment: str = "rlhf"
    """name of the experiment"""
    name: str = ""
    """name of the run; empty takes the name of its folder"""

    writes: ClassVar[tuple[str, ...]] = ("mlflow.db", "trackers.json")

    def check(self) -> None:
        """Raise UsageError if the package is not installed."""
        needs_package("mlflow", "mlflow", "mlflow")

    def __call__(self, run: RunView) -> Tracker:
        return _Sending(self, run)


class _Sending(Tracker):
    """Sends one run. A resumed run sends only what is new: what comes after its checkpoint has the same numbers."""

    def __init__(self, options: MLflow, run: RunView) -> None:
        from mlflow import MlflowClient

        super().__init__()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.output / 'mlflow.db').resolve()}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._last: dict[str, int] = {}
        """the last step that is there of each metric"""
        ident = tracker_run_id(run, "mlflow")
        known = self._client.get_experiment_by_name(options.experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(options.experiment)
        before = self._client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{ident}'")
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        name = options.name or run.output.name
        self._id = self._client.create_run(experiment, run_name=name, tags={TAG: ident}).info.run_id
        for key, value in _flatten(options_of_run(run)):
            self._client.log_param(self._id, key, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        fresh = [Metric(key, float(value), now, step) for key, value in metrics.items() if step > self._last_step(key)]
        self._last |= dict.fromkeys(metrics, step)
        self._client.log_batch(self._id, metrics=fresh)

    def _last_step(self, name: str) -> int:
        if name not in self._last:
            self._last[name] = max((m.step for m in self._client.get_metric_history(self._id, name)), default=-1)
        return self._last[name]

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def _flatten(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Options as dotted names and text; MLflow takes at most 6,000 characters of each."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value)[:6000]
