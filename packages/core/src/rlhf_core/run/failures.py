"""Turns expected failures (non-finite numbers, a full disk, no memory left) into one-line errors with advice.

The newest checkpoint stays as it is in all of them: a run that stops here writes none, and a checkpoint that could not be
written whole leaves nothing.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlhf_core.errors import NotFinite, NotFiniteReward, RunStopped, UsageError, run_option, text_of
from rlhf_core.plugins.attribution import note_provider
from rlhf_core.training.determinism import REFUSED
from rlhf_core.training.nonfinite import keep_samples
from rlhf_core.training.token_budget import error_chain, is_out_of_memory, requested_memory

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.training.step_metrics import Meter

__all__ = ["Progress", "is_full", "newest_checkpoint", "translate_failures"]

FULL = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|StorageFull|PytorchStreamWriter failed writing|iostream error"
)
"""Messages of libraries that hide the operating system's error."""

SMALLER_BATCHES = (
    f"lower {run_option('micro_tokens')} or {run_option('chunk')}, or add {run_option('on_oom', 'halve')} "
    "(results stay the "
    "same in all three)"
)
LESS_MEMORY = {
    "rollout": f"lower {run_option('sampling.max_new_tokens')}, {run_option('sampling.n')} or "
    f"{run_option('batch_size')}",
    "train": SMALLER_BATCHES,
    "needs": SMALLER_BATCHES,
    "checkpoint": (
        f"leave out {run_option('save_async')}, lower {run_option('micro_tokens')} or choose a smaller "
        f"{run_option('model')}"
    ),
}
"""Three things that would help, by phase."""


class Progress(Protocol):
    """The state of a run that a message about its failure needs."""

    registry: Registry
    """source of the providers"""
    config: RunConfig
    """the chosen providers"""
    meter: Meter
    """the metrics of the step at hand; it knows the phase that the run is in, or failed in"""

    @property
    def output(self) -> Path:
        """The folder of the run."""
        ...

    @property
    def step(self) -> int:
        """The number of finished steps."""
        ...


@contextmanager
def translate_failures(run: Progress) -> Iterator[None]:
    """Turns such ends into `RunStopped`; anything else passes."""
    try:
        yield
    except NotFinite as error:
        raise RunStopped(_not_finite(run, error)) from error
    except UsageError:  # already states what to do
        raise
    except Exception as error:
        note_provider(error, run.registry, run.config)
        if is_full(error):
            raise RunStopped(
                f"no space is left for {run.output} ({run.meter.doing}, step {run.step}), and {newest_checkpoint(run)}; "
                f"free some space, then continue with {run_option('resume', True)} ({run_option('keep', 1)} needs "
                "the least)"
            ) from error
        if not isinstance(error, UsageError) and (lost := _lost_file(error, run.output)) is not None:
            raise RunStopped(
                f"{lost.filename}: {lost.strerror} ({run.meter.doing}, step {run.step}), and {newest_checkpoint(run)}; "
                f"fix that, then continue with {run_option('resume', True)}"
            ) from error
        if is_out_of_memory(error):
            wanted = f" (it asked for {requested_memory(error)} more)" if requested_memory(error) else ""
            batches = f"{run_option('micro_tokens')} or {run_option('batch_size')}"
            advice = LESS_MEMORY.get(run.meter.doing, f"lower {batches}, or choose a smaller {run_option('model')}")
            raise RunStopped(
                f"out of memory in phase {run.meter.doing!r} of step {run.step + 1}{wanted}, and "
                f"{newest_checkpoint(run)}; {advice}"
            ) from error
        if REFUSED in str(error):
            raise RunStopped(
                f"{str(error).split(' ', 1)[0]} has no deterministic implementation ({run.meter.doing}, step "
                f"{run.step + 1}); leave {run_option('deterministic')} out, or the option that needs this operation "
                "(docs/reliability.md lists some)"
            ) from error
        raise


def _not_finite(run: Progress, error: NotFinite) -> str:
    """Save the samples; return the message."""
    path = keep_samples(run.output, run.step + 1, error)
    saved = f"{len(error.samples)} samples are in {path}" if error.samples else "another rank saved the samples"
    advice = "fix the reward" if isinstance(error, NotFiniteReward) else "look at them and lower the learning rate"
    skip = run_option("on_nonfinite", "skip")
    return f"step {run.step + 1}: {text_of(error)}; {saved}, and {newest_checkpoint(run)}: {advice}, or continue with {skip}"


def newest_checkpoint(run: Progress) -> str:
    """Return words for the checkpoint that is left."""
    from rlhf_core.checkpoint import valid_checkpoints

    try:
        found = valid_checkpoints(run.output)
    except OSError as error:
        return f"its checkpoints cannot be listed ({error.strerror})"
    return (
        f"the newest checkpoint is {found[-1].name}"
        if found
        else f"there is no checkpoint yet ({run_option('save_every')})"
    )


def _lost_file(error: BaseException, output: Path) -> OSError | None:
    """The error of the operating system about a file in the run's folder that `error` is, or came from."""
    for each in error_chain(error):
        if isinstance(each, OSError) and each.filename and Path(os.fsdecode(each.filename)).is_relative_to(output):
            return each
    return None


def is_full(error: BaseException) -> bool:
    """Return True if an error, or one that it came from, is a full disk or quota, or a file beyond its limit."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any((isinstance(e, OSError) and e.errno in numbers) or FULL.search(str(e)) for e in error_chain(error))
