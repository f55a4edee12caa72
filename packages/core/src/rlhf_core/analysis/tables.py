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
        raise UsageError(f"{path} is not there; let the run write it with the evaluator heldout_table")
    try:
        if path.suffix == ".parquet":
            table = check_parquet().read_table(path)
            found = {name: table[name].to_pylist() for name in names if name in table.column_names}
        else:
            rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
            found = {name: [row[name] for row in rows] for name in names if rows and name in rows[0]}
    except (OSError, ValueError, KeyError, TypeError) as error:  # those of pyarrow are among them
        raise DataError(f"{path} cannot be read: {error}") from None
    for name in names:
        if name not in found:
            raise DataError(f"{path} has no column {name!r}")
    return found


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys; numbers with all their digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
