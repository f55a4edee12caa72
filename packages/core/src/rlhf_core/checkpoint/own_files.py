"""The files of a run: what it may write, replace and remove in its folder. Anything else there belongs to the user.

    OUTPUT/run.json
        run      drawn when the run began; identifies its checkpoints
        config   config.toml as the run wrote it
        names    the run's files and folders in OUTPUT (folders end in /); a name is written here before the file appears
    later    files and folders that commands wrote there afterwards, such as rlhf-run eval
        xxh3     checksum of the above

Every checkpoint has a copy, so that a lost run.json is found again.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from rlhf_core.checkpoint.lock import RunLock
from rlhf_core.checkpoint.manifest import list_checkpoints
from rlhf_core.errors import UsageError, run_option
from rlhf_core.util.atomic_files import remove_leftovers, write_text

__all__ = [
    "OWN_FILES",
    "OwnFiles",
    "check_foreign",
    "claim_folder",
    "new_files",
    "own_checkpoints",
    "read_own_files",
    "remove_own_leftovers",
]

OWN_FILES = "run.json"


@dataclass(frozen=True)
class OwnFiles:
    """Contents of OUTPUT/run.json."""

    run: str
    config: str = ""
    names: tuple[str, ...] = ()
    later: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write OUTPUT/run.json."""
        content = asdict(self)
        write_text(folder / OWN_FILES, json.dumps({**content, "xxh3": _digest(content)}, indent=1) + "\n")

    def with_names(self, names: Iterable[str]) -> OwnFiles:
        """Return the same with more names."""
        return replace(self, names=tuple(sorted({*self.names, *names})))


def new_files() -> OwnFiles:
    """Return those of a run that begins: none yet."""
    return OwnFiles(secrets.token_hex(8))


def read_own_files(folder: Path) -> OwnFiles | None:
    """Return what run.json in `folder` holds; None if it is missing or damaged."""
    try:
        found = json.loads((folder / OWN_FILES).read_text(encoding="utf-8"))
        digest = found.pop("xxh3")
        if digest != _digest(found):
            return None
        return OwnFiles(found["run"], found["config"], tuple(found["names"]), tuple(found.get("later", ())))
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):  # whatever a flipped byte makes of it
        return None


def own_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoint folders that the run in `output` wrote, oldest first."""
    own = read_own_files(output)
    return [folder for folder in list_checkpoints(output) if own is not None and _run_of(folder) == own.run]


def check_foreign(output: Path, wanted: Iterable[str], own: OwnFiles) -> None:
    """Check that whatever has one of the names that a run will write was written by that run.

    Args:
        output: folder of the run.
        wanted: names in it; those of folders end in /.
        own: the run's files.

    Raises:
        UsageError: something was not, is a link, or is a folder in place of a file or the reverse.
    """
    elsewhere = f"name another {run_option('output')}"
    for name in wanted:
        for path in (output / name, *(output / f".{name.rstrip('/')}.{end}" for end in ("tmp", "old"))):
            if path.is_symlink():
                raise UsageError(f"{path} is a link, but the run writes there; remove it, or {elsewhere}")
            if not os.path.lexists(path):
                continue
            if name not in own.names:
                raise UsageError(
                    f"{path} exists and is not a file of this run, which would overwrite it; move it away, or "
                    f"{elsewhere}"
                )
            if path == output / name and path.is_dir() != name.endswith("/"):
                kinds = ("file", "folder") if name.endswith("/") else ("folder", "file")
                raise UsageError(
                    f"{path} is a {kinds[0]}, but the run has a {kinds[1]} there; restore it, or {elsewhere}"
                )


def claim_folder(output: Path, names: Iterable[str], beside_run: bool = False) -> None:
    """Make the folder of a command that trains nothing, and write down which files in it are the command's.

    Args:
        output: the folder.
        names: what the command writes in it; those of folders end in /.
        beside_run: the folder may be that of a run, whose own files stay as they are.

    Raises:
        UsageError: something of such a name is not the command's, the folder is a run's and may not be, a run in it is going,
            or it cannot be written.
    """
    names, found = list(names), read_own_files(output)
    own = found or new_files()
    if own.config and not beside_run:
        raise UsageError(f"{output} is the folder of a run; name another {run_option('output')}")
    if found is None:
        check_foreign(output, [OWN_FILES], own)
    try:
        if own.config:
            RunLock(output).refuse_holder()
            if taken := [name for name in names if name in own.names and os.path.lexists(output / name)]:
                raise UsageError(f"{output / taken[0]} belongs to the run; name another {run_option('output')}")
            check_foreign(output, names, replace(own, names=own.later))
            replace(own, later=tuple(sorted({*own.later, *names}))).write(output)
            return
        check_foreign(output, names, own)
        output.mkdir(parents=True, exist_ok=True)
        own.with_names(names).write(output)
    except OSError as error:
        raise UsageError(f"cannot write to {run_option('output')} {output}: {error.strerror}") from None


def remove_own_leftovers(output: Path, own: OwnFiles) -> None:
    """Remove what a killed process of this run left under temporary names."""
    for name in (OWN_FILES, *own.names, "checkpoints/best.json"):
        remove_leftovers(output / name)


def _run_of(folder: Path) -> str:
    """Return the run that wrote a checkpoint; empty if it is unknown."""
    found = read_own_files(folder)
    return found.run if found is not None else ""


def _digest(content: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
