"""The folder of a run while the run is open: locked, with its configuration written, and without changes to other files."""

from __future__ import annotations

import errno
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Literal, get_origin

from rlhf_core.checkpoint.lock import RunLock
from rlhf_core.checkpoint.manifest import find_damage, list_checkpoints
from rlhf_core.checkpoint.own_files import (
    OWN_FILES,
    OwnFiles,
    check_foreign,
    new_files,
    read_own_files,
    remove_own_leftovers,
)
from rlhf_core.errors import OptionError, UsageError, run_option
from rlhf_core.util.atomic_files import check_links, write_text
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig

__all__ = ["OutputFolder"]

LOGS = ("metrics.jsonl", "samples.jsonl", "evaluation-metrics.jsonl")
NAMES = (
    "config.toml",
    "checkpoints/",
    "failed/",
    "record/",
    "about.json",
    "report.html",
    *LOGS,
    *(f"{name}.damaged" for name in LOGS),
)
"""Files and folders that every run may write, its exports apart."""
READERS = ("data", "reward", "environment", "rollout")
"""Kinds of providers whose options may be paths that the run reads."""


class OutputFolder:
    """OUTPUT of one run.

    Args:
        config: the run.
        exports: folders in OUTPUT that are written at the end, such as `model`.
    """

    def __init__(self, config: RunConfig, exports: Iterable[str]) -> None:
        self.config, self.path = config, Path(config.output)
        self.exports = [f"{name}{average}/" for name in exports for average in ("", "-ema")]
        self.names = [*NAMES, *(name for _, each in config.provider_paths() for name in each.writes)]
        self.lock = RunLock(self.path)
        self.own = new_files()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the folder, check what is in it, and write the configuration. Of several ranks, all look and the first writes.

        Raises:
            UsageError: the folder cannot be written; holds a run, and `--resume` was not given, or none, and it was; holds a
                run with other options, or one that is still going; or has something of a name that the run would write.
        """
        follows = int(os.environ.get("RANK", "0")) > 0  # no rank has joined the others yet
        try:
            if follows:
                self._check_kind()
            else:
                self._look()
        except OSError as error:
            raise self._unwritable(error) from None
        if follows:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._begin()
            yield
        finally:
            self.lock.release()

    def check(self) -> None:
        """Raise what `open` would raise, as far as that is known without writing anything.

        Raises:
            UsageError: see `open`.
        """
        try:
            self._look()
            place = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise self._unwritable(error) from None

    def claim_exports(self) -> None:
        """Write down that the exports are the run's, just before they appear.

        Raises:
            UsageError: something of such a name appeared while the run was going, or the run no longer holds its folder.
        """
        self.lock.check()
        check_foreign(self.path, self.exports, self.own)
        self.own = self.own.with_names(self.exports)
        self.own.write(self.path)

    def _begin(self) -> None:
        """Look again, now that no other process writes, and take the folder."""
        config = replace(self.config, resume=False, resume_changed=False)
        try:
            own = self._check()
            remove_own_leftovers(self.path, own)
            for leftover in (self.path / "checkpoints").glob(".step-*"):  # of a process killed while it saved
                if re.fullmatch(r"\.step-\d+\.(tmp|old)", leftover.name):
                    rmtree(leftover)
            self.own = replace(own.with_names(self.names), config=_to_toml(config))
            self.own.write(self.path)
            write_text(self.path / "config.toml", self.own.config)
        except OSError as error:
            raise self._unwritable(error) from None

    def _look(self) -> None:
        """Check what is in the folder, before anything is written."""
        self._check_kind()
        self.lock.refuse_holder()
        self._check()

    def _check_kind(self) -> None:
        if "\0" in self.config.output:
            raise OptionError("/output", f"{self.config.output!r} contains a NUL character; name a folder")
        if self.path.exists() and not self.path.is_dir():
            raise OptionError("/output", f"{self.path} is a file; name a folder")
        if self.path.is_symlink() and not self.path.exists():
            raise OptionError("/output", f"{self.path} is a broken link; remove it, or name a folder")
        check_links(self.path)

    def _check(self) -> OwnFiles:
        """Return the run's files as they are now; nothing is written.

        Raises:
            UsageError: see `open`.
        """
        from rlhf_core.config.resume import check_resume

        own = self._own_files()
        if own.names and self._holds_run() and not self.config.resume:
            raise UsageError(
                f"{self.path} already holds a run; add {run_option('resume', True)} to continue it, or name another "
                f"{run_option('output')}"
            )
        check_foreign(self.path, [*self.names, *self.exports], own)
        _check_reads(self.config, self.path, [*self.names, *self.exports])
        if self._resumes():
            self._check_config(own)
            check_resume(self.config, own.config)
        return own

    def _holds_run(self) -> bool:
        """Return True if a run came to its first step here; one that ended by a mistake before it did not."""
        return any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints"))

    def _resumes(self) -> bool:
        return self.config.resume is True or (self.config.resume == "auto" and self._holds_run())

    def _own_files(self) -> OwnFiles:
        """Return what run.json holds, or its copy in the newest checkpoint; nothing for a run that begins.

        Raises:
            UsageError: there is none, and something to resume; or run.json is a file of something else.
        """
        if (self.path / OWN_FILES).is_dir():
            raise UsageError(f"{self.path / OWN_FILES} is a folder, but a run lists its files there; move it away")
        found = read_own_files(self.path)
        if found is not None:
            return found
        if not self._resumes():
            check_foreign(self.path, [OWN_FILES], new_files())
            return new_files()
        for folder in reversed(list_checkpoints(self.path)):
            copy = read_own_files(folder)
            if copy is not None and not find_damage(folder):
                log.warning(f"{self.path / OWN_FILES} is missing or damaged; using the copy in {folder.name}")
                return copy
        lost = any((self.path / name).exists() for name in (OWN_FILES, *self.names))
        raise UsageError(
            f"{self.path / OWN_FILES}, the list of the run's files, is missing or damaged, and no checkpoint has a "
            f"copy; restore it, or start over with another {run_option('output')}"
            if lost
            else (
                f"there is no run in {self.path} to resume; leave out {run_option('resume', True)} to start one, or "
                f"pass {run_option('resume', 'auto')} to start or continue"
            )
        )

    def _check_config(self, own: OwnFiles) -> None:
        """Check that config.toml is as the run wrote it: what a user changed in it is not written over."""
        path = self.path / "config.toml"
        if not path.exists():
            log.warning(f"{path} is missing; it is restored from {OWN_FILES}")
        elif _read(path) != own.config.encode():
            raise UsageError(
                f"{path} was edited or damaged after the run wrote it; rename it (the run writes it again), and "
                f"pass changes as flags or with {run_option('config')} and the new name"
            )

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(f"cannot write to {run_option('output')} {self.path}: {error.strerror or error}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; make it readable, since a resumed run reads it"
        ) from None


def _check_reads(config: RunConfig, output: Path, names: Iterable[str]) -> None:
    """Check that the run reads nothing that it would write over.

    Raises:
        UsageError: a model or a file of data is the output folder, or one of the files that the run writes there.
    """
    root = output.resolve()
    written = [root / name.rstrip("/") for name in names]
    for path, value in _inputs(config):
        try:
            place = Path(value).resolve()
            overwritten = place == root or any(place.is_relative_to(each) for each in written)
            overwritten = overwritten and bool(value) and place.exists()
        except (OSError, ValueError, RuntimeError):  # no path, or one that cannot be
            continue
        if overwritten:
            raise UsageError(
                f"{run_option(path)} {value} is a path that the run would overwrite; name another "
                f"{run_option('output')}"
            )


def _inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(option, value) of every text that may be a path to read."""
    tree = tomllib.loads(_to_toml(config))
    for role in config.roles:
        yield f"{role}.model", str(tree[role].get("model", ""))
    yield "model", str(tree["model"])
    words = {
        f"{path.lstrip('/')}.{name}" for path, each in config.provider_paths(*READERS) for name in _word_fields(each)
    }
    for kind in READERS:
        if kind in tree:
            yield from ((path, text) for path, text in _texts(tree[kind], kind) if path not in words)


def _word_fields(provider: Any) -> Iterator[str]:
    """Names of the provider's options that are one of several words, and so no path: `--data.select best`."""
    from rlhf_core.config.option_fields import annotation_of, option_fields

    for each in option_fields(type(provider)):
        if get_origin(annotation_of(type(provider), each.name)) is Literal:
            yield each.name


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, text) of every text in a tree, less names of providers."""
    if isinstance(value, str) and not path.endswith("use"):
        yield path, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _texts(each, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each, path)


def _to_toml(config: RunConfig) -> str:
    from rlhf_core.config.builder import to_toml

    return to_toml(config)
