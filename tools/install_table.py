"""Writes packages/core/src/rlhf_core/plugins/known_packages.py: which distribution provides which name.

Core must say "pip install rlhf-rollout-vllm" for a name whose package is absent, so it has to know the names of its
siblings. They are read from the siblings' own plugin modules, never typed twice.

    python tools/install_table.py          writes the file
    python tools/install_table.py --check  fails if it is not current (a test runs this)
"""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "packages/core/src"))
from rlhf_core.contract.hooks import KINDS  # of this checkout, whichever is installed

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "packages/core/src/rlhf_core/plugins/known_packages.py"

HEAD = '''"""Names that each sibling distribution provides. Written by tools/install_table.py: do not edit."""

from __future__ import annotations

__all__ = ["INSTALL"]

INSTALL: dict[str, dict[str, str]] = {
'''


def table() -> dict[str, dict[str, str]]:
    """`{kind: {name: distribution}}` of every package beside core, sorted."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        sys.path.insert(0, str(file.parent / "src"))
        for module in project.get("entry-points", {}).get("rlhf", {}).values():
            for hook, function in vars(import_module(module)).items():
                kind = hook.removeprefix("rlhf_")
                if kind in KINDS and hasattr(function, "rlhf_impl"):
                    found.setdefault(kind, {}).update(dict.fromkeys(function(), project["name"]))
    return {kind: dict(sorted(names.items())) for kind, names in sorted(found.items())}


def text() -> str:
    """The whole file."""
    lines = []
    for kind, names in table().items():
        lines += [
            f'    "{kind}": {{\n',
            *(f'        "{name}": "{dist}",\n' for name, dist in names.items()),
            "    },\n",
        ]
    return HEAD + "".join(lines) + "}\n"


if __name__ == "__main__":
    if "--check" in sys.argv and text() != TARGET.read_text(encoding="utf-8"):
        sys.exit("known_packages.py is not current: run python tools/install_table.py")
    if "--check" not in sys.argv:
        TARGET.write_text(text(), encoding="utf-8")
