"""`rlhf-run translate 'OLD COMMAND'`: the command of `rlhf-run` in the place of one of OpenRLHF, TRL, verl or RLHFlow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.contract.commands import Command
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import Registry

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Translate"]


@dataclass(frozen=True)
class Translate(Command):
    """Print the command that replaces one of OpenRLHF, TRL, verl or RLHFlow, and name options without an equivalent."""

    old: str
    """old command in quotes, or a file that contains it"""
    write: str = ""
    """TOML file to write the run's options to, for --config; empty writes none"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.translation.translate import translate

        registry = context.registry
        assert isinstance(registry, Registry)
        translation = translate(_read(self.old), registry)
        if self.write:
            remarks = [f"# {line}" for line in translation.remarks()]
            _write(Path(self.write), translation.tree(registry) if translation.is_run else None, remarks)
            print("\n".join([" ".join([*translation.program, "--config", self.write]), *remarks]))
        else:
            print(translation.text())
        if problem := translation.problem(registry):
            print(f"# it cannot run unchanged: {problem}")
        return 0


def _read(old: str) -> str:
    """Return the old command, from a file where one is named."""
    from rlhf_core.util.text_files import read_text

    path = Path(old)
    if len(old) > 255 or not path.is_file():
        return old
    if path.suffix in (".yaml", ".yml"):
        raise UsageError(
            f"{old} does not name the program that reads it; give the whole command, such as 'trl dpo --config {old}'"
        )
    return read_text(path)


def _write(path: Path, tree: dict[str, object] | None, remarks: list[str]) -> None:
    """Write a configuration, with what it lacks as comments at its head."""
    import tomli_w

    from rlhf_core.util.atomic_files import write_text

    if tree is None:
        raise UsageError("--write writes the configuration of a run, but this command does not train; leave it out")
    try:
        write_text(path, "".join(f"{line}\n" for line in remarks) + tomli_w.dumps(tree))
    except OSError as error:
        raise UsageError(f"--write {path}: {error.strerror}") from None
