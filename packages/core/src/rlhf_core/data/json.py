"""`--data json`: rows of a local .json or .jsonl file.

The whole file is read and checked before the run starts, so that a malformed row 90,000 is an error of the first second
and not of the fifth hour. That pass keeps the place of each row, 12 bytes, and a row is read again when it is drawn. Training
and held-out rows share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import lru_cache
from operator import index as to_index
from pathlib import Path
from typing import Any, ClassVar, overload
from weakref import WeakValueDictionary

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.data.columns import OPTIONAL, Columns
from rlhf_core.data.json_index import FileIndex
from rlhf_core.data.mixture import PickedRows, drop_duplicates
from rlhf_core.data.plain_rows import PlainCheck
from rlhf_core.data.prepare import Preparation
from rlhf_core.errors import DataError, OptionError, UsageError, option

__all__ = ["Json", "JsonRows", "hold_out", "rows_of"]


@dataclass(frozen=True)
class Json(Preparation, Columns):
    """Rows of a local .json or .jsonl file: prompts, demonstrations or preferences."""

    path: str
    """the file: one object per line, or a list of objects"""
    _: KW_ONLY
    heldout_path: str = ""
    """file of the held-out rows"""
    heldout: float = 0.0
    """rows held out of `path` if there is no such file: below 1 a share, from 1 a number; always the same rows"""
    limit: int = 0
    """maximum number of rows; 0 uses all"""

    runs_ahead: ClassVar[bool] = True

    @property
    def holds_out(self) -> bool:
        return bool(self.heldout or self.heldout_path)

    def check(self) -> None:
        """Reject a missing file before anything heavy starts."""
        super().check()
        for path in filter(None, (self.path, self.heldout_path)):
            try:
                Path(path).stat()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from None
            except ValueError as error:  # a null byte
                raise DataError(f"{path!r}: {error}") from None

    def __call__(self, split: str) -> Sequence[Example]:
        if split == "heldout" and self.heldout_path:
            return self._read(self.heldout_path)
        examples = self._read(self.path)
        if self.heldout_path or not self.heldout:
            if split == "heldout":
                raise UsageError(
                    f"no rows are held out: pass {option('heldout', 0.1)} or {option('heldout_path', 'FILE')}"
                )
            return examples
        train, heldout = hold_out(len(examples), self.heldout)
        return PickedRows.select(examples, heldout if split == "heldout" else train)

    def _read(self, path: str) -> Sequence[Example]:
        """The checked rows of a file; those of an earlier call that are still in use, if the file is the same."""
        state = _identity(path)
        key = (path, state, self.limit, *(getattr(self, each.name) for each in fields(Columns)))
        rows = _IN_USE.get(key) if state else None
        if rows is None:
            checked = JsonRows.check(path, self, self.limit)
            rows = drop_duplicates(checked, set()) if self.unique else checked
            if state:
                _IN_USE[key] = rows
        return rows


class JsonRows(Sequence[Example]):
    """Rows of a checked file by number; a row is parsed when it is asked for.

    Args:
        index: of the file.
        columns: with every key filled in.
    """

    def __init__(self, index: FileIndex, columns: Columns) -> None:
        self._index, self._columns = index, columns

    @classmethod
    def check(cls, path: str, columns: Columns, limit: int = 0) -> JsonRows:
        """Read a file once and check its first `limit` rows, all for 0.

        Raises:
            DataError: `file:row: ` what is wrong with a row; or there are no rows.
        """
        index = FileIndex(path)
        first: tuple[Any, str] | None = None
        failure: DataError | None = None
        known, check = columns, PlainCheck(columns)
        for block in index.blocks(limit):
            if first is None:
                first = block[0], index.origin(0)
                known = columns.find_columns(*first) if isinstance(block[0], dict) else columns
                check = PlainCheck(known)
            if not check.accepts(block):
                for number, row in enumerate(block, len(index) - len(block)):
                    if not check(row) and failure is None:
                        failure = _problem(known, row, index.origin(number))
        if first is None:
            raise DataError(f"{path}: the file has no rows")
        row, origin = first
        if isinstance(row, dict):
            later = {name: None for shape in check.shapes for name in OPTIONAL if name in shape}
            columns = columns.infer_columns(later | row, origin)
        checked = cls(index, columns)
        if columns != known:  # a later row has a column that is put before prompts
            problems = (_problem(columns, index.value(i), index.origin(i)) for i in range(len(index)))
            failure = next(filter(None, problems), None)
        if failure is not None:
            raise failure
        return checked

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return PickedRows.select(self, range(*index.indices(len(self))))
        row = to_index(index)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self._columns.example(self._index.value(row), self._index.origin(row))


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield `(file:row, value)` of each row of a file, counted from 1 (in a .jsonl file: its line)."""
    index = FileIndex(str(path))
    for number, value in enumerate(index.scan()):
        yield index.origin(number), value


_IN_USE: WeakValueDictionary[tuple[Any, ...], Sequence[Example]] = WeakValueDictionary()
"""Rows in memory: training and held-out rows are of one index."""


def _identity(path: str) -> tuple[int, ...]:
    """Return what changes when a file changes; empty for what is not a regular file, which is read once."""
    try:
        found = Path(path).stat()
        return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size) if Path(path).is_file() else ()
    except (OSError, ValueError):  # reading it finds the words
        return ()


def _problem(columns: Columns, row: Any, origin: str) -> DataError | None:
    """Return the error in a row, if there is one."""
    try:
        columns.example(row, origin)
    except DataError as error:
        return error
    return None


@lru_cache(maxsize=4)  # the arrays of training rows live as long as a run, and take most of it
def hold_out(rows: int, heldout: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of train and held-out, both ascending; the draw depends on nothing but the two arguments."""
    count = round(rows * heldout) if heldout < 1 else int(heldout)
    if not 0 < count < rows:
        raise OptionError(
            "heldout",
            f"{heldout:g} gives {rows - count} rows to train on and {count} held-out rows of {rows}; change it "
            "so that both have rows",
        )
    order = np.random.default_rng(0).permutation(rows)
    return np.sort(order[count:]), np.sort(order[:count])
