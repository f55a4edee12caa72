"""The outputs that roles can give in a run: core's, and those that plugins register under their names."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_core.contract.outputs import Output
from rlhf_core.contract.registry_view import RegistryView
from rlhf_core.contract.requirements import OUTPUTS, letters, per_row, per_token
from rlhf_core.errors import UsageError

__all__ = ["OutputTable"]


class OutputTable:
    """Every output by name.

    Args:
        registry: where names are looked up; everything installed if absent.
    """

    def __init__(self, registry: RegistryView | None) -> None:
        from rlhf_core.plugins.registry import default_registry

        self._registry: RegistryView = registry if registry is not None else default_registry()
        self.names = tuple(dict.fromkeys((*OUTPUTS, *self._registry.table("output"))))
        """core's first"""

    def check(self, name: str, asker: object) -> str:
        """Return `name`, which the provider `asker` asks of the role that it trains.

        Raises:
            UsageError: no output is called so.
        """
        if name not in self.names:
            raise UsageError(
                f"{type(asker).__qualname__} needs the output {name!r}, which no forward pass gives; the known "
                f"outputs are {', '.join(self.names)}, and '<role>.<name>_NT' of losses that compare two roles"
            )
        return name

    def providers(self, names: Iterable[str]) -> dict[str, Output]:
        """Return the providers of those outputs that are not core's own.

        Raises:
            UsageError: a name has no shape, or an output needs an option that has no default.
        """
        return {name: self._make(name) for name in sorted(names) if name not in OUTPUTS}

    def _make(self, name: str) -> Output:
        if not per_row(name) or len(letters(name)) > (3 if per_token(name) else 2):
            raise UsageError(
                f"the name of the output {name!r} must end in its shape: _N, _NT, or one more letter, such as _NH "
                "or _NTK"
            )
        cls = self._registry.resolve("output", name)
        try:
            made: Output = cls()
        except TypeError as error:
            raise UsageError(
                f"the output {name!r} cannot be created without options: {error}; give each option a default"
            ) from None
        return made
