"""`rlhf-run new-plugin`: a package that works, to be changed into what its author wants."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

from rlhf_core.cli import templates
from rlhf_core.contract.commands import Command
from rlhf_core.errors import UsageError

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["NewPlugin"]


@dataclass(frozen=True)
class NewPlugin(Command):
    """Write a working plugin package with a test: the folder rlhf-NAME here."""

    name: str
    """the provider's name: small letters, digits and dashes"""
    kind: Literal["data", "reward", "advantage", "loss", "evaluator"] = "reward"
    """what it provides"""

    def __call__(self, context: CommandContext) -> int:
        words = self.name.removeprefix("rlhf-")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", words):
            raise UsageError(f"new-plugin {self.name}: a name is small letters, digits and dashes, such as brevity")
        folder = Path(f"rlhf-{words}")
        if folder.exists():
            raise UsageError(f"new-plugin {self.name}: the folder {folder} exists already")
        name = words.replace("-", "_")
        if (taken := context.registry.table(self.kind).get(name)) is not None:
            raise UsageError(f"new-plugin {self.name}: {taken.plugin} already provides the {self.kind} {name!r}")
        values = {
            "kind": self.kind,
            "name": name,
            "dist": folder.name,
            "module": f"rlhf_{name}",
            "cls": "".join(word.capitalize() for word in words.split("-")),
            "run": templates.RUN[self.kind],
        }
        files = {
            "pyproject.toml": templates.PYPROJECT,
            "README.md": templates.README,
            f"rlhf_{name}.py": templates.MODULES[self.kind],
            f"test_rlhf_{name}.py": templates.TEST,
        }
        folder.mkdir()
        for file, template in files.items():
            text = Template(Template(template).substitute(values)).substitute(values)  # `run` has names in it too
            (folder / file).write_text(text, encoding="utf-8")
        print(f"{folder} is ready: python3 -m pip install -e {folder} && python3 -m pytest {folder}")
        return 0
