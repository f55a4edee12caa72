"""`rlhf-run new-plugin`: a package that works, to be changed into what its author wants."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from string import Template
from typing import TYPE_CHECKING, Any

from rlhf_core.cli import templates
from rlhf_core.contract.commands import Command
from rlhf_core.contract.hooks import KindName
from rlhf_core.errors import UsageError
from rlhf_core.util.atomic_files import fresh_folder
from rlhf_core.util.places import new_folder

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["NewPlugin"]


@dataclass(frozen=True)
class NewPlugin(Command):
    """Write a working plugin package with a test: the folder rlhf-NAME here."""

    name: str
    """name of the provider: lowercase letters, digits and dashes"""
    kind: KindName = "reward"
    """kind of provider to create"""

    def __call__(self, context: CommandContext) -> int:
        words = self.name.removeprefix("rlhf-")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", words):
            raise UsageError(
                f"new-plugin {self.name}: the name must consist of lowercase letters, digits and dashes, such as "
                "brevity"
            )
        folder = new_folder("new-plugin", f"rlhf-{words}")
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
        with fresh_folder(folder, replace=False) as new:
            for file, content in files.items():
                text = Template(Template(content).substitute(values)).substitute(values)  # `run` has names in it too
                (new / file).write_text(text, encoding="utf-8")
        print(f"{folder} is ready: python3 -m pip install -e {folder} && python3 -m pytest {folder}")
        return 0
