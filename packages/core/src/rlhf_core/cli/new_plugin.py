"""`rlhf-run new-plugin`: a package that works, to be changed into what its author wants."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from rlhf_core.cli import templates
from rlhf_core.contract.commands import Command
from rlhf_core.contract.hooks import KindName
from rlhf_core.errors import UsageError

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["NewPlugin"]


@dataclass(frozen=True)
class NewPlugin(Command):
    """Write a working plugin package with a test: the folder rlhf-NAME here."""

    name: str
    """the provider's name: small letters, digits and dashes"""
    kind: KindName = "reward"
    """what it provides"""

    def __call__(self, context: CommandContext) -> int:
        words = self.name.removeprefix("rlhf-")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", words):
            raise UsageError(f"new-plugin {self.name}: a name is small letters, digits and dashes, such as brevity")
        folder = Path(f"rlhf-{words}")
        if os.path.lexists(folder):
            raise UsageError(f"new-plugin {self.name}: the folder {folder} exists already")
        name = words.replace("-", "_")
        if (taken := context.registry.table(self.kind).get(name)) is not None:
            raise UsageError(f"new-plugin {self.name}: {taken.plugin} already provides the {self.kind} {name!r}")
        template: Any = import_module(f"{templates.__name__}.{self.kind}")
        values = {
            "kind": self.kind,
            "name": name,
            "dist": folder.name,
            "module": f"rlhf_{name}",
            "cls": "".join(word.capitalize() for word in words.split("-")),
            "run": template.RUN,
        }
        files = {
            "pyproject.toml": templates.PYPROJECT,
            "README.md": templates.README,
            f"rlhf_{name}.py": template.MODULE,
            f"test_rlhf_{name}.py": template.TEST,
        }
        try:
            folder.mkdir()
        except OSError as error:
            raise UsageError(f"new-plugin {self.name}: {folder}: {error.strerror}") from None
        for file, content in files.items():
            text = Template(Template(content).substitute(values)).substitute(values)  # `run` has names in it too
            (folder / file).write_text(text, encoding="utf-8")
        print(f"{folder} is ready: python3 -m pip install -e {folder} && python3 -m pytest {folder}")
        return 0
