"""A run that trains nothing: roles are placed and asked, for commands such as `generate` and `eval`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.contract.options import RunConfig
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.run.run import Run

__all__ = ["NoTraining", "open_untrained"]


@dataclass(frozen=True)
class NoTraining(Algorithm):
    """An algorithm without terms: roles that are sampled or asked, and never trained."""

    samples: tuple[str, ...] = ("actor",)

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return ()


@contextmanager
def open_untrained(config: RunConfig, registry: Registry) -> Iterator[Run]:
    """Yield a run whose roles are placed and which is not trained: it has no checkpoint and calls no observer."""
    from rlhf_core.run.run import Run

    run = Run(config, registry)
    run.check()
    with run.place():
        if run.world.size > 1:
            raise UsageError("start this command as one process; split the work with --shard where it has one")
        yield run
