"""`rlhf-run plugins`: every name that can be chosen, and where it comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.config.docstrings import first_line
from rlhf_core.contract.commands import Command
from rlhf_core.contract.hooks import KINDS, KindName
from rlhf_core.plugins.registry import conflict_text

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.contract.registry_view import RegistryView

__all__ = ["ListedProvider", "Plugins", "list_providers"]


@dataclass(frozen=True)
class ListedProvider:
    """One line of the list."""

    kind: str
    name: str
    distribution: str
    version: str
    description: str


@dataclass(frozen=True)
class Plugins(Command):
    """List installed providers: kind, name, distribution, version and a summary; broken plugins come last."""

    kind: Literal["", KindName, "metric"] = ""
    """kind of provider to list; empty lists all kinds except metrics"""
    json: bool = False
    """print JSON: providers, conflicts and broken plugins"""

    def __call__(self, context: CommandContext) -> int:
        registry = context.registry
        listed = [row for row in list_providers(registry, self.kind) if self.kind in ("", row.kind)]
        if self.json:
            self._print_json(registry, listed)
            return 0
        wide = [max((len(getattr(row, name)) for row in listed), default=0) for name in ("kind", "name")]
        origin = max((len(f"{row.distribution} {row.version}") for row in listed), default=0)
        for row in listed:
            left = f"{row.kind:{wide[0]}}  {row.name:{wide[1]}}  {f'{row.distribution} {row.version}':{origin}}"
            print(f"{left}  {row.description}".rstrip())
        for entries in registry.conflicts:
            print(f"conflict: {conflict_text(entries)}")
        for broken in registry.broken_plugins:
            print(f"broken: {broken}")
        return 0

    def _print_json(self, registry: RegistryView, listed: list[ListedProvider]) -> None:
        import json

        conflicts = [[{"kind": e.kind, "name": e.name, **asdict(e.plugin)} for e in es] for es in registry.conflicts]
        broken = [{**asdict(each.plugin), "error": str(each)} for each in registry.broken_plugins]
        found = {"providers": [asdict(row) for row in listed], "conflicts": conflicts, "broken": broken}
        print(json.dumps(found, indent=2))


def list_providers(registry: RegistryView, kind: str = "") -> list[ListedProvider]:
    """Every provider by kind and name, then the plugins that observe runs; metrics only where they are asked for."""
    found = [
        ListedProvider(each, name, entry.plugin.distribution, entry.plugin.version, first_line(entry.target))
        for each in KINDS
        for name, entry in registry.table(each).items()
    ]
    for plugin, doc in registry.observers():
        said = f"{doc.partition(chr(10))[0].rstrip('.')} (always loaded; -p no:{plugin.name} blocks it)".lstrip()
        found.append(ListedProvider("observer", plugin.name, plugin.distribution, plugin.version, said))
    for plugin, name, said in registry.metrics() if kind == "metric" else ():
        found.append(ListedProvider("metric", name, plugin.distribution, plugin.version, said))
    return found
