"""TensorBoard: `--observer tensorboard`, then `tensorboard --logdir OUTPUT/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.contract.providers import Observer
from rlhf_core.observer.tracker import Tracker, needs_package

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["TensorBoard"]


@dataclass(frozen=True)
class TensorBoard(Observer):
    """Event files of TensorBoard, in OUTPUT/tensorboard: every metric, and samples as text."""

    samples_every: int = 10
    """steps between samples; 0 logs none"""

    writes: ClassVar[tuple[str, ...]] = ("tensorboard/", "trackers.json")

    def check(self) -> None:
        """Raise UsageError if the package is not installed."""
        needs_package("tensorboard", "tensorboard", "tensorboard")

    def __call__(self, run: RunView) -> Tracker:
        return _Writing(run, self.samples_every)


class _Writing(Tracker):
    """Writes one folder. TensorBoard purges steps that an interrupted run wrote beyond its checkpoint when it reads."""

    def __init__(self, run: RunView, samples_every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(samples_every)
        purged = run.step + 1 if run.config.resume else None
        self._writer: Any = SummaryWriter(str(run.output / "tensorboard"), purge_step=purged)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for i, row in enumerate(rows):
            told = "\n\n".join(f"**{name}** {value}" for name, value in row.items())
            self._writer.add_text(f"samples/{i}", told, step)

    def close(self, failed: bool) -> None:
        self._writer.close()
