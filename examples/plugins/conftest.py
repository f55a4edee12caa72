"""Lets the tests of a package that is not installed find its modules, here and in the processes that they start."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

for folder in sorted(Path(__file__).parent.glob("*/")):
    source = folder / "src" if (folder / "src").is_dir() else folder
    modules = [path.stem for path in source.glob("rlhf_*")]
    if modules and not all(find_spec(module) for module in modules):
        sys.path.append(str(source))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(source))))
