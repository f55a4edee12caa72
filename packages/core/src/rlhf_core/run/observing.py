"""The observers of a run: plugins with observer hooks, and the observers that the run names.

Hooks are called in the leader. An observer, or a plugin, that declares `all_ranks = True` is called in every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.run.callbacks import Callbacks

if TYPE_CHECKING:
    from rlhf_core.contract.engines import Engines
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
    def watch(self, run: RunView, engines: Engines) -> Iterator[None]:
        """Make the observers that the run names and those of plugins, and call their hooks while the context is open.

        Their states are stored with those of `engines`.
        """
        observers: dict[str, object] = {}
        names, chosen = run.config.names_of("observer"), run.config.providers.get("observer", ())
        for name, observer in zip(names, chosen, strict=True):
            if run.leader or observer.all_ranks:
                watching = observer(run)
                engines.add(watching, f"observer.{name}", f"observer {name}")
                observers[f"observer {name!r}"] = watching
        if run.config.callbacks and run.leader:
            observers["callbacks"] = Callbacks(run.config.callbacks)
        self.objects = list(observers.values())
        for watching in self.notify("rlhf_watch", run):
            name = f"{type(watching).__module__}.{type(watching).__qualname__}"
            name = name if name not in observers else f"{name}.{len(observers)}"
            engines.add(watching, f"watch.{name}", name)
            observers[name] = watching
        with self.registry.with_observers(observers):
            yield

    def notify(self, hook: str, run: RunView, **arguments: Any) -> list[Any]:
        """Call `hook` of every observer of this rank; return their answers, those that are None left out."""
        return self.registry.notify(hook, run.leader, run=run, **arguments)
