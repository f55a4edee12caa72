"""Weights & Biases: `--observer wandb --observer.project my-runs`.

The key is wandb's own affair: `wandb login`, or WANDB_API_KEY. There is no option for it, so that no file can hold it.
Data that wandb collects by default without a request stays off: the command line (flags may hold tokens), the terminal,
the environment's packages, the git state.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.providers import Observer
from rlhf_core.errors import UsageError, option
from rlhf_core.observer.tracker import Tracker, needs_package, options_of_run, tracker_run_id

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["Wandb"]

DATA_DIR = "WANDB_DATA_DIR"
"""Variable for the folder of what waits to be sent: two files per table, which wandb keeps in the home otherwise."""
COLLECTS_NOTHING = {
    "console": "off",
    "silent": True,
    "save_code": False,
    "disable_git": True,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


@dataclass(frozen=True)
class Wandb(Observer):
    """A run of Weights & Biases: every metric, the options, and a table of samples. The key: `wandb login`."""

    project: str = "rlhf"
    """name of the project"""
    entity: str = ""
    """user or team; empty takes the account's default"""
    name: str = ""
    """name of the run; empty takes the name of its folder"""
    mode: Literal["auto", "online", "offline"] = "auto"
    """connection: `offline` writes OUTPUT/wandb for a later `wandb sync`; `auto` follows WANDB_MODE, and is online
    without it"""
    samples_every: int = 10
    """steps between tables of samples; 0 sends none"""

    writes: ClassVar[tuple[str, ...]] = ("wandb/", "trackers.json")

    def check(self) -> None:
        """Raise UsageError if the package is not installed or, online, if there is no key.

        Raises:
            UsageError: no key, or no answer.
        """
        needs_package("wandb", "wandb", "wandb")
        if self._mode() != "online":
            return
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise UsageError(
                f"observer wandb: {error} (or log only on this machine with {option('mode', 'offline')})"
            ) from None

    def __call__(self, run: RunView) -> Tracker:
        return _Sending(self, run, self._mode())

    def _mode(self) -> str:
        return os.environ.get("WANDB_MODE", "online") if self.mode == "auto" else self.mode


class _Sending(Tracker):
    """Sends one run. A resumed run sends nothing again: what comes after its checkpoint has the same numbers."""

    def __init__(self, options: Wandb, run: RunView, mode: str) -> None:
        import wandb

        super().__init__(options.samples_every)
        self._keeps_data = DATA_DIR not in os.environ
        if self._keeps_data:
            os.environ[DATA_DIR] = str((run.output / "wandb").resolve())
        self._hooks = sys.exit, sys.excepthook  # wandb.init replaces both for the process, and leaves its own
        self._table: Any = wandb.Table
        self._run: Any = wandb.init(
            project=options.project,
            entity=options.entity or None,
            name=options.name or run.output.name,
            id=tracker_run_id(run, "wandb"),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]  # WANDB_MODE may hold anything; wandb reports errors
            dir=str(run.output),
            config=options_of_run(run),
            settings=wandb.Settings(**COLLECTS_NOTHING),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self._run.step:
            self._run.log(dict(metrics), step=step)

    def show(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if step >= self._run.step and rows:
            table = self._table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            self._run.log({"completions": table}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        sys.exit, sys.excepthook = self._hooks
        if self._keeps_data:
            os.environ.pop(DATA_DIR, None)
