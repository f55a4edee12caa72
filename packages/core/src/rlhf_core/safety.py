"""Ends that are nobody's bug: numbers that are no longer finite, a full disk, no memory left. One line each, and what to do.

The newest checkpoint stays as it is in all of them: a run that stops here writes none, and a checkpoint that could not be
written whole leaves nothing.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf_core.errors import NotFinite, RunStopped
from rlhf_core.lazy import torch
from rlhf_core.observer.files import append_line

if TYPE_CHECKING:
    from rlhf_core.run import Run

__all__ = ["explained"]

FULL = re.compile(
    r"No space left on device|Disk quota exceeded|StorageFull|PytorchStreamWriter failed writing|iostream error"
)
"""How libraries that hide the operating system's error say it."""

LESS_MEMORY = {
    "rollout": "--sampling.max-new-tokens, --sampling.n or --batch-size",
    "train": "--micro-tokens (results stay the same), --chunk (same) or a shorter --sampling.max-new-tokens",
    "needs": "--micro-tokens (results stay the same), --chunk (same) or a shorter --sampling.max-new-tokens",
}
"""Three options that would help, by phase; the usual ones elsewhere."""


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turns such ends into `RunStopped`; anything else passes."""
    try:
        yield
    except NotFinite as error:
        raise RunStopped(_not_finite(run, error)) from error
    except Exception as error:
        if _is_full(error):
            raise RunStopped(
                f"no space is left for {run.output} ({run.doing}, step {run.step}); {_newest(run)}; free some, then "
                "continue with --resume (--keep 1 needs the least)"
            ) from error
        if _is_out_of_memory(error):
            how_much = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", str(error))
            wanted = f" (it asked for {how_much[1]} more)" if how_much else ""
            options = LESS_MEMORY.get(run.doing, "--micro-tokens, --batch-size or a smaller --model")
            raise RunStopped(
                f"out of memory in phase {run.doing!r} of step {run.step + 1}{wanted}; {_newest(run)}; lower {options}"
            ) from error
        raise


def _not_finite(run: Run, error: NotFinite) -> str:
    """Save the samples; what to say."""
    path = run.output / "failed" / f"step-{run.step + 1}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in error.samples:
        append_line(path, row)
    saved = f"{len(error.samples)} samples are in {path}" if error.samples else "another rank saved the samples"
    return f"step {run.step + 1}: {error}; {saved}; {_newest(run)}; look at them, or lower the learning rate"


def _newest(run: Run) -> str:
    """The checkpoint that is left, in words."""
    from rlhf_core.checkpoint import valid_checkpoints

    found = valid_checkpoints(run.output)
    return f"the newest checkpoint is {found[-1].name}" if found else "there is no checkpoint yet (--save-every)"


def _is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is a full disk or quota."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return any((isinstance(e, OSError) and e.errno in numbers) or FULL.search(str(e)) for e in _chain(error))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a device or of the machine ran out."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return any(isinstance(e, kinds) or "DefaultCPUAllocator: can't allocate" in str(e) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
