"""Files of JSON lines that a run appends to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.util.atomic_files import write_bytes
from rlhf_core.util.messages import log
from rlhf_core.util.secrets import redact_tree

__all__ = ["append_line", "cut_lines"]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(redact_tree(row), ensure_ascii=False) + "\n")


def cut_lines(path: Path, keep: Callable[[int], bool]) -> None:
    """Keep the lines whose step `keep` accepts; a half-written last line goes too.

    A damaged line is named in a warning and moved to PATH.damaged; those after it stay.
    """
    if not path.exists():
        return
    content, damaged_path = path.read_bytes(), path.with_name(f"{path.name}.damaged")
    *lines, half = content.split(b"\n")  # not splitlines: JSON leaves U+2028 and its like in its strings
    if half and not half.startswith(b"{"):  # no beginning of a line: zeros that a crash left, for example
        lines, half = [*lines, half], b""
    right, damaged = [], []
    for number, line in enumerate(lines, start=1):
        step = _step_of(line)
        if step is None:
            log.warning(f"{path}:{number} is damaged; moved to {damaged_path.name}")
            damaged.append(line + b"\n")
        elif keep(step):
            right.append(line + b"\n")
    if (step := _step_of(half)) is not None and keep(step):  # only its end is missing
        right.append(half + b"\n")
    if damaged:
        before = damaged_path.read_bytes() if damaged_path.exists() else b""
        write_bytes(damaged_path, before + b"".join(damaged))
    if b"".join(right) != content:
        write_bytes(path, b"".join(right))


def _step_of(line: bytes) -> int | None:
    """Return the step of a line; None if it is damaged."""
    try:
        step = json.loads(line.decode())["step"]  # as UTF-8: `json` takes zeros for UTF-32
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None
