"""Says on the console, once in a while, that importance weights have collapsed: nearly all on one sample of each prompt.

The estimates are then unreliable, the negative term follows single samples, and CTL gets a noisy signal. Silence
between two warnings is counted in steps, so that a long run is not drowned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import hookimpl
from rlhf_core.errors import run_option
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["CollapseWarning", "threshold"]

SHARE = 0.05  # of the way from one sample to all of them
QUIET = 100  # steps between two warnings


def threshold(n: int) -> float:
    """The effective sample size, of `n`, below which weights count as collapsed."""
    return 1 + SHARE * (n - 1)


class CollapseWarning:
    """Watches a run, and remembers the step of its last warning."""

    def __init__(self) -> None:
        self.last: int | None = None

    @hookimpl
    def rlhf_step_end(self, run: RunView, step: int, metrics: Mapping[str, Any]) -> None:
        """Warn if this step's effective sample size is below the threshold, unless there was a warning lately."""
        ess, n = metrics.get("repulse/ess"), run.config.sampling.n
        if ess is None or ess >= threshold(n) or (self.last is not None and step - self.last < QUIET):
            return
        self.last = step
        message = (
            f"step {step}: importance weights have collapsed (repulse/ess {ess:.2f} of {n} samples): the target is "
            f"too far from the proposal. Move {run_option('algorithm.target.beta')} closer to 0 or anneal it with "
            f"start-beta, or raise {run_option('sampling.n')}, {run_option('algorithm.proposal_updates')} or "
            f"{run_option('proposal.optim.lr')}"
        )
        log.warning(run.config.option_names.render(message))
