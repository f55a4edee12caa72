"""Token budget of a role's micro-batches; with `--on-oom halve`, it shrinks after memory ran out.

A micro-batch that does not fit halves the budget, and the whole optimizer step (or inference) is done again. How a batch is
cut changes no result beyond rounding (see `training.reduction`), so that only memory and speed differ. Left out: several
ranks, which would have to agree in the middle of a step in which some of them wait for others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig

__all__ = ["TokenBudget", "error_chain", "is_out_of_memory", "release_memory", "requested_memory"]


class TokenBudget:
    """The budget of one role."""

    tokens: int
    """cells of a micro-batch, padding included"""

    def __init__(self, config: RunConfig, role: str, world: World) -> None:
        self.tokens = config.micro_tokens
        self._role, self._names = role, config.option_names
        self._may_halve = config.on_oom == "halve"
        self._cells = self._units = 0
        if self._may_halve and world.size > 1:
            raise UsageError(
                f"{run_option('on_oom', 'halve')} works only in one process, not {world.size}; lower "
                f"{run_option('micro_tokens')} instead"
            )

    def record_attempt(self, micro: Batch, unit: int = 1) -> None:
        """A micro-batch is about to be used."""
        self._units = len(micro) // unit
        self._cells = len(micro) * int((micro.prompt_lengths_N + micro.lengths_N).max())

    def halve(self, error: Exception) -> bool:
        """Return True if fewer tokens at a time can help: memory ran out, and the batch can be split."""
        if not self._may_halve or self._units < 2 or not is_out_of_memory(error):
            return False
        self.tokens = self._cells // 2
        message = (
            f"role {self._role!r} ran out of memory with {self._cells} tokens at a time; it continues with "
            f"{self.tokens} ({run_option('micro_tokens', self.tokens)} would start there)"
        )
        log.warning(self._names.render(message))
        return True


def release_memory() -> None:
    """Give what is no longer used back to the device."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory of a device or of the machine ran out."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return any(isinstance(e, kinds) or "DefaultCPUAllocator: can't allocate" in str(e) for e in error_chain(error))


def requested_memory(error: BaseException) -> str:
    """Return the size of the failed request for memory; empty if the error does not contain it."""
    found = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", " ".join(map(str, error_chain(error))))
    return found[1] if found else ""


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
