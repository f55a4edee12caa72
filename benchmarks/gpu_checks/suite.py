"""The tests of the packages that are marked gpu."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["suite"]


def suite(context: Context) -> None:
    """Run pytest on the files that have such tests. In a rehearsal they are collected only."""
    from source_tree import ROOT

    marked = re.compile(r"mark\.gpu\b")
    files = [
        str(path)
        for path in sorted(ROOT.glob("packages/*/tests/**/test_*.py"))
        if marked.search(path.read_text("utf-8"))
    ]
    how = ["--collect-only", "-q"] if context.rehearse else ["-q", "--durations=5", "-rs"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *how, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(5.0, context.left() - 3))
    print(done.stdout, done.stderr)
    lines = done.stdout.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            context.note(line[:300])
        elif line.startswith("E  "):
            context.note(f"`{line[:200]}`")
    context.expect("tests marked gpu pass", done.returncode == 0, lines[-1] if lines else done.stderr[-300:])
