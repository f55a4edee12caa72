"""Files of JSON lines that a run appends to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.util.atomic_files import write_bytes
from rlhf_core.util.secrets import redact

__all__ = ["append_line", "cut_lines"]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(redact(json.dumps(row, ensure_ascii=False)) + "\n")


def cut_lines(path: Path, keep: Callable[[int], bool]) -> None:
    """Keep the lines whose step `keep` accepts; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines: JSON leaves U+2028 and its like in its strings
        try:
            if keep(json.loads(line)["step"]):
                kept.append(line + b"\n")
        except ValueError:
            break
    write_bytes(path, b"".join(kept))
