"""Figures with matplotlib, which is optional. No window is opened, and the same numbers give the same file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import MissingPackage

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FORMATS", "check_matplotlib", "figure"]

FORMATS = ("png", "svg", "pdf")


def check_matplotlib() -> None:
    """Say how to install it before anything is computed.

    Raises:
        MissingPackage: it is not there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingPackage("figures need matplotlib: python3 -m pip install 'rlhf-core[plot]'") from None


@contextmanager
def figure(stem: Path, formats: Sequence[str], panels: int = 1) -> Iterator[list[Any]]:
    """Axes side by side; written as `stem.<format>` when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.2 * panels, 3.8), layout="constrained", dpi=110)
    FigureCanvasAgg(drawn)
    yield list(drawn.subplots(1, panels, squeeze=False)[0])
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "rlhf", "svg.fonttype": "none"}):
        for each in formats:
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(each)
            drawn.savefig(stem.with_name(f"{stem.name}.{each}"), metadata=metadata)
