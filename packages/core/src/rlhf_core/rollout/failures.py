"""Episodes that fail: each ends alone, and too many of them stop the run."""

from __future__ import annotations

from rlhf_core.contract.batch import Example
from rlhf_core.contract.providers import Environment
from rlhf_core.errors import UsageError, run_option
from rlhf_core.util.messages import log

__all__ = ["CLOSING_SECONDS", "Failures", "describe", "late_session", "warn_unclosed"]

CLOSING_SECONDS = 30.0
"""Limit on closing the sessions of a batch: what takes longer is left open, so that it does not hold the run."""


class Failures:
    """Counts the failed episodes of a batch.

    Args:
        share: of the episodes that may fail, 0 to 1.
        episodes: of the batch.
    """

    def __init__(self, share: float, episodes: int) -> None:
        self.share, self.episodes = share, episodes
        self.count = 0
        self.first: Exception | None = None

    def add(self, error: Exception, where: str) -> None:
        """Count one, and log the first; `where` names the episode. Raises `error` if there are more than the share allows."""
        self.count += 1
        if self.count > self.share * self.episodes:
            if self.share:
                error.add_note(
                    f"{self.count} of {self.episodes} episodes failed, more than {run_option('episode.failures', self.share)} "
                    "allows"
                )
            raise error
        if self.first is None:
            self.first = error
            log.warning(f"an episode failed and is left out of training, {where}: {type(error).__name__}: {error}")


def describe(environment: Environment, example: Example) -> str:
    """Name the environment and the example, for messages."""
    kind = type(environment)
    prompt = str(example.prompt)
    shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}…"
    origin = f" of {example.origin}" if example.origin else ""
    return f"environment {kind.__qualname__} of {kind.__module__}, on the prompt {shown!r}{origin},"


def late_session(seconds: float) -> UsageError:
    """Return the error of an episode whose environment makes no session within the batch's `seconds`."""
    advice = run_option("episode.seconds")
    return UsageError(f"the environment did not begin the episode within the {seconds:g} s of a batch; raise {advice}")


def warn_unclosed(environment: Environment, count: int) -> None:
    """Log that sessions did not close in time."""
    log.warning(
        f"environment {type(environment).__qualname__}: sessions not closed within {CLOSING_SECONDS:g} s: {count}; they are "
        "left as they are, and what they hold may stay open"
    )
