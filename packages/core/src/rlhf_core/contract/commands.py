"""A command of `rlhf-run`: a frozen dataclass whose fields are options, called with a `CommandContext`.

    @dataclass(frozen=True)
    class Hello(Command):
        \"\"\"Greet a person.\"\"\"

        name: str
        \"\"\"the person to greet\"\"\"
        times: int = 1
        \"\"\"number of greetings\"\"\"

        def __call__(self, context: CommandContext) -> int:
            print(f"Hello {self.name}! " * self.times)
            return 0

Fields without a default are positional words in their order, the others are flags. A command that declares `defaults` and
`roles` has the flags of providers and models too, and gets a configuration made of them: it can open a run that trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rlhf_core.contract.providers import Provider

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.registry_view import RegistryView
    from rlhf_core.contract.run_view import RunView

__all__ = ["Command", "CommandContext"]


class CommandContext(Protocol):
    """The plugins, and the run that the flags of a command describe."""

    @property
    def registry(self) -> RegistryView:
        """The installed plugins and providers."""
        ...

    @property
    def config(self) -> RunConfig:
        """The chosen providers, the options of the roles, and the command's own fields that a run has too, such as `seed`.

        Raises:
            UsageError: a value that no run can have.
        """
        ...

    def open_run(self, config: RunConfig | None = None) -> AbstractContextManager[RunView]:
        """Place the roles of `config` (the context's own if absent) and yield a run that trains nothing.

        It writes no checkpoint and calls no observer; everything is closed at the end.

        Raises:
            UsageError: the configuration cannot work, or several processes were started.
        """
        ...


class Command(Provider):
    """The base of commands."""

    defaults: ClassVar[Mapping[str, str | None]] = {}
    """the kinds of providers that the command uses, each with its usual name; `""` must be chosen, None may be left out"""
    reads_run: ClassVar[bool] = False
    """True if an algorithm and the flags of a run follow its own flags; `context.config` is that run"""
    roles: ClassVar[Mapping[str, Any]] = {}
    """the roles that the command uses, each with its default `ModelOptions`"""

    def __call__(self, context: CommandContext) -> int:
        """Do the work and return the exit code of the process, 0 to 255."""
        raise NotImplementedError
