"""Tables of named columns: what evaluators leave (Parquet or JSON lines) and what analyses write (CSV)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.errors import DataError, MissingPackage, UsageError
from rlhf_core.util.atomic_files import write_bytes, write_text

__all__ = ["check_parquet", "read_columns", "write_csv", "write_parquet"]


def check_parquet() -> Any:
    """pyarrow's Parquet module.

    Raises:
        MissingPackage: it is not there.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingPackage("Parquet files need pyarrow: python3 -m pip install 'rlhf-core[datasets]'") from None
    return parquet


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length."""
    parquet = check_parquet()
    import pyarrow

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """The named columns of a Parquet file, or of JSON lines.

    Raises:
        UsageError: there is no such file.
        DataError: it is damaged, or has no such column.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; write it with a run that has the evaluator heldout_table")
    try:
        if path.suffix == ".parquet":
            table = check_parquet().read_table(path)
            found = {name: table[name].to_pylist() for name in names if name in table.column_names}
        else:
            return _read_lines(path, names)
    except (OSError, ValueError, KeyError, TypeError) as error:  # those of pyarrow are among them
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read: {first}") from None
    for name in names:
        if name not in found:
            raise DataError(f"{path} has no column {name!r}")
    return found


def _read_lines(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the named columns of JSON lines.

    Raises:
        DataError: a line is damaged or lacks a column; names file and line.
    """
    found: dict[str, list[Any]] = {name: [] for name in names}
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path} has no rows")
    for number, line in lines:
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected one JSON object; remove the damaged line")
        for name in names:
            if name not in row:
                raise DataError(f"{path}:{number} has no column {name!r}")
            found[name].append(row[name])
    return found


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys; numbers with all their digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
