"""Files of JSON lines that a command adds to, so that it continues after a kill: used by `generate` and `score`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.errors import RunStopped, UsageError
from rlhf_core.util.atomic_files import force, replacing, write_text
from rlhf_core.util.secrets import redact, redact_tree

__all__ = ["append_lines", "continue_output", "parse_line", "whole_lines", "write_lines"]


def continue_output(path: Path, **options: object) -> None:
    """Let a command write to `path`, and continue an existing file if the options that made it were these.

    Fingerprints of the options are kept next to it, in PATH.options.json; those that change no result are left out.

    Raises:
        UsageError: nothing can be written there, the file is none of the command's, or was begun with other options.
    """
    note = path.with_name(f"{path.name}.options.json")
    told = {
        name: hashlib.sha256(repr(_plain_options(value)).encode()).hexdigest()[:16] for name, value in options.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError(f"--output {path} is a folder; name a file")
        if path.is_symlink() and not path.exists():
            raise UsageError(f"--output {path} is a broken link; name a file")
        if path.exists() and not path.is_file():  # a device may have no end, and a pipe cannot be read again
            raise UsageError(f"--output {path} is a device or a pipe; name a file")
        if note.exists() and not _is_note(note, told):
            raise UsageError(f"{note} is not a file of this command; name another --output")
        if not note.exists() and path.exists() and path.stat().st_size:
            raise UsageError(f"--output {path} exists and is not a file of this command; name another")
        begun = json.loads(note.read_bytes()) if path.exists() and note.exists() else told
        write_text(note, json.dumps(begun, indent=1) + "\n")
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path}: {getattr(error, 'strerror', None) or error}") from None
    changed = [name for name in begun if begun[name] != told[name]]
    if changed:
        raise UsageError(f"{path} was started with another --{changed[0]}; name another --output, or remove the file")


def _is_note(note: Path, told: Mapping[str, str]) -> bool:
    """Return True if `note` is a file of fingerprints of these options."""
    try:
        found = json.loads(note.read_bytes())
    except ValueError:
        return False
    return (
        isinstance(found, dict)
        and bool(found)
        and found.keys() <= told.keys()  # an earlier version had fewer options
        and all(len(str(each)) == 16 for each in found.values())
    )


def _plain_options(value: object) -> object:
    """A provider's or role's options without those that change no result."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    free = {each.name: each.default for each in dataclasses.fields(value) if each.metadata.get("free")}
    return dataclasses.replace(value, **free)


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield each line of a file that an earlier run of the command left, with its end, less a half-written last one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def parse_line(path: Path, line: bytes) -> dict[str, Any]:
    """Return the object in a line.

    Raises:
        UsageError: there is none.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a file with one JSON object per line; name another --output")
    return found


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Replace a file by lines, which may be read from it; readers see the old file or the new one."""
    with replacing(path) as file:
        file.writelines(lines)


def _redact_text(value: object) -> str:
    """Return the text of a value that JSON does not know."""
    return redact(str(value))


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add a line per row in one write, in place of a half-written last line, and force it to the disk.

    A killed writer leaves at most half of its last line.

    Raises:
        RunStopped: the disk is full, or the file can no longer be written; the lines before are whole.
    """
    content = "".join(
        json.dumps(redact_tree(row), ensure_ascii=False, default=_redact_text) + "\n" for row in rows
    ).encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            whole = _whole_size(descriptor)
            os.ftruncate(descriptor, whole)
            try:
                view, end = memoryview(content), whole
                while view:
                    written = os.pwrite(descriptor, view, end)
                    view, end = view[written:], end + written
            except OSError:
                os.ftruncate(descriptor, whole)
                raise
        finally:
            os.close(descriptor)
        force(path)
    except OSError as error:
        raise RunStopped(
            f"{path}: {error.strerror}; all of its lines are complete, so run the command again to continue"
        ) from error


def _whole_size(descriptor: int) -> int:
    """Bytes of a file up to the end of its last whole line."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 2**16)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
