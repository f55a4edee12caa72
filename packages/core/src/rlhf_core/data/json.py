"""`--data json`: rows of a local .json or .jsonl file.

The whole file is read and checked before the run starts, so that a malformed row 90,000 is an error of the first second
and not of the fifth hour. Files larger than memory are for a streaming reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.data.columns import OPTIONAL, Columns
from rlhf_core.data.mixture import PickedRows, drop_duplicates
from rlhf_core.data.prepare import Preparation
from rlhf_core.errors import DataError, OptionError, UsageError, option
from rlhf_core.util.text_files import read_text

__all__ = ["Json", "rows_of"]


@dataclass(frozen=True)
class Json(Preparation, Columns):
    """Rows of a local .json or .jsonl file: prompts, demonstrations or preferences."""

    path: str
    """the file: one object a line, or a list of objects"""
    _: KW_ONLY
    heldout_path: str = ""
    """file of the held-out rows"""
    heldout: float = 0.0
    """rows held out of `path` where there is no such file: below 1 a share, from 1 a number; always the same rows"""
    limit: int = 0
    """use the first so many rows; 0 uses all"""

    runs_ahead: ClassVar[bool] = True

    @property
    def holds_out(self) -> bool:
        return bool(self.heldout or self.heldout_path)

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
        rows = list(rows_of(Path(path)))
        if not rows:
            raise DataError(f"{path}: the file has no rows")
        rows = rows[: self.limit] if self.limit else rows
        columns: Columns = self
        if isinstance(first := rows[0][1], dict):
            later = {name: None for _, row in rows if isinstance(row, dict) for name in OPTIONAL if name in row}
            columns = self.infer_columns(later | first, rows[0][0])
        examples = [columns.example(row, origin) for origin, row in rows]
        return drop_duplicates(examples, set()) if self.unique else examples


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """`(file:row, value)` of each row, counted from 1 (in a .jsonl file: its line)."""
    try:
        text = read_text(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start})") from None
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parse(text, f"{path}", 1), start=1):
            yield f"{path}:{number}", row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}", number)


def _parse(text: str, path: str, first_line: int) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:  # an escape may be half of a pair, which no tokenizer can read
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: expected one JSON object a line, or a list of objects "
            f"({error.msg} at column {error.colno})"
        ) from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{path}:{first_line}: {_column(value, half)}half a character, {half!r}, stands alone; write both halves"
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{first_line}: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}:{first_line}: {error}") from None
    return value


def _column(row: Any, text: str) -> str:
    """`'key': ` of the column that `text` is in, where `row` is one row and says so."""
    columns = row.items() if isinstance(row, dict) else ()
    found = next((key for key, value in columns if text in json.dumps(value, ensure_ascii=False)), None)
    return "" if found is None else f"{found!r}: "


def hold_out(rows: int, heldout: float) -> tuple[list[int], list[int]]:
    """Row numbers of train and held-out, both ascending; the draw depends on nothing but the two arguments."""
    count = round(rows * heldout) if heldout < 1 else int(heldout)
    if not 0 < count < rows:
        raise OptionError(
            "heldout", f"{heldout:g} leaves {rows - count} of {rows} rows to train on and {count} held out"
        )
    order = np.random.default_rng(0).permutation(rows)
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())
