"""Template of `new-plugin --kind command`: a command and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run $name rlhf-"

MODULE = '''\
from __future__ import annotations

from dataclasses import dataclass

from rlhf_core import Command, CommandContext, UsageError, hookimpl


@dataclass(frozen=True)
class $cls(Command):
    """List the distributions that plugins come from.

    Fields without a default are positional words, the others are flags.
    """

    prefix: str
    """prefix of the names, such as rlhf-"""
    versions: bool = True
    """print versions too"""

    def __call__(self, context: CommandContext) -> int:
        plugins = [each for each in context.registry.plugins.values() if each.distribution.startswith(self.prefix)]
        if not plugins:
            raise UsageError(f"no plugin comes from a distribution called {self.prefix}...; see rlhf-run plugins")
        for line in sorted({str(each) if self.versions else each.distribution for each in plugins}):
            print(line)
        return 0


@hookimpl
def rlhf_command() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
import pytest
from rlhf_core.testing import check_command

from $module import $cls


def test_it_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_command($cls("rlhf-", versions=False)) == 0
    assert capsys.readouterr().out == "rlhf-core\\n"
"""
