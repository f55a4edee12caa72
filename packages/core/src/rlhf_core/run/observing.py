"""The observers of a run: plugins with observer hooks, and the observers that the run names.

Hooks are called in the leader. An observer, or a plugin, that declares `all_ranks = True` is called in every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView
    from rlhf_core.plugins.registry import Registry

__all__ = ["Observers"]


class Observers:
    """Calls observer hooks.

    Args:
        registry: the plugins; their hooks and those of the chosen observers are called together.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.objects: list[Any] = []
        """the objects that the chosen observers watch with in this rank, while the run is open"""

    @contextmanager
    def watch(self, run: RunView) -> Iterator[None]:
        """Make the observers that the run names, and call their hooks while the context is open."""
        chosen = [each for each in run.config.providers.get("observer", ()) if run.leader or each.all_ranks]
        self.objects = [observer(run) for observer in chosen]
        with self.registry.with_observers(self.objects, chosen):
            yield

    def notify(self, hook: str, run: RunView, **arguments: Any) -> list[Any]:
        """Call `hook` of every observer of this rank; return their answers, those that are None left out."""
        return self.registry.notify(hook, run.leader, run=run, **arguments)
