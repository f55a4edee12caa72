"""Templates of `new-plugin`. `$name` and the like are filled in; everything else is the author's file.

One module per kind of provider has its class (MODULE), its test (TEST) and a command that uses it (RUN).
"""

from __future__ import annotations

__all__ = ["PYPROJECT", "README"]

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$dist"
version = "0.1.0"
description = "A provider for rlhf-core, of the kind $kind."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["rlhf-core>=0.1,<0.2"]

[project.entry-points.rlhf]
$name = "$module"
"""

README = """\
# $dist

Adds `$name`, of the kind $kind, to rlhf-core.

    python3 -m pip install -e .
    rlhf-run plugins --kind $kind
    $run

Change `$module.py`: the fields of the class are the options, calling it does the work. `python3 -m pytest` checks that
it keeps the contract; compare its numbers with a formula of your own too.
"""
