"""Base class of trackers: passes on each metric of a run once, evaluations included, and some samples.

A tracker is an observer provider: called with a run it returns the object that watches it, here a `Tracker` that knows
how one library takes numbers. A resumed run continues the same run of the tracker, by the id that is kept in its folder.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import hookimpl
from rlhf_core.errors import MissingPackage
from rlhf_core.observer.files import samples
from rlhf_core.util.atomic_files import write_text
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["Tracker", "needs_package", "options_of_run", "tracker_run_id"]


class Tracker:
    """Passes on the numbers of a run; a subclass defines the destination.

    Args:
        samples_every: steps between two calls of `show`; 0 for none.
    """

    def __init__(self, samples_every: int = 0) -> None:
        self.samples_every = samples_every
        self._evaluated: frozenset[str] = frozenset()
        """names of the metrics that were handed on since the last step ended"""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of a step. Steps never go back; one may come twice, with other names."""
        raise NotImplementedError

    def show(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take some samples of a step: prompt, completion, and reward and advantage where there are any."""

    def close(self, failed: bool) -> None:
        """Write what is still held, and end."""

    @hookimpl
    def rlhf_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.log(step, metrics)
        self._evaluated = frozenset(metrics)

    @hookimpl
    def rlhf_step_end(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> None:
        new = {name: value for name, value in metrics.items() if name != "step" and name not in self._evaluated}
        self._evaluated = frozenset()
        self.log(step, new)
        if self.samples_every and (step % self.samples_every == 0 or step == run.config.steps):
            self.show(step, list(samples(run)))

    @hookimpl
    def rlhf_run_end(self, error: BaseException | None) -> None:
        self.close(failed=error is not None)


def needs_package(module: str, name: str, extra: str) -> None:
    """Check that the package of a tracker is installed, without importing it.

    Raises:
        MissingPackage: it is not.
    """
    if find_spec(module) is None:
        raise MissingPackage(f"observer {name} needs {module}: python3 -m pip install 'rlhf-core[{extra}]'")


def options_of_run(run: RunView) -> dict[str, Any]:
    """The run's configuration as plain data; secrets are masked."""
    import tomllib

    from rlhf_core.config.builder import to_toml

    return tomllib.loads(to_toml(run.config))


def tracker_run_id(run: RunView, tracker: str, given: str = "") -> str:
    """The id of the tracker's run: that of before if the run is resumed, else `given`, or a new one; kept in the folder."""
    path = run.output / "trackers.json"
    known = _read_ids(path) if run.config.resume and path.exists() else {}
    if tracker not in known:
        known[tracker] = given or uuid.uuid4().hex[:12]
        write_text(path, json.dumps(known, indent=1) + "\n")
    return known[tracker]


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids by the name of the tracker; none, with a warning, if the file is damaged."""
    try:
        known: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = None
    if isinstance(known, dict) and all(isinstance(ident, str) and ident for ident in known.values()):
        return known
    log.warning(f"{path} is damaged, so trackers show the resumed run as a new run")
    return {}
