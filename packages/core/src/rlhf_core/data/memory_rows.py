"""`memory`: rows that a Python user has at hand, as a list or as a table of the library `datasets`.

    make_config("sft", model=…, data=[{"prompt": "2 + 2 =", "completion": "4"}])
    make_config("sft", model=…, data={"rows": table, "heldout": 0.1, "prompt_key": "question"})

Columns mean what they mean in files. Those that nothing else reads go to reward functions, by their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import INTERNAL
from rlhf_core.data.columns import Columns
from rlhf_core.data.hf import StreamRows, TableRows, without_decoding
from rlhf_core.data.json import hold_out
from rlhf_core.data.mixture import PickedRows, drop_duplicates, limit_rows
from rlhf_core.data.prepare import Preparation
from rlhf_core.errors import DataError, OptionError, UsageError, option

__all__ = ["MemoryRows"]


@dataclass(frozen=True)
class MemoryRows(Preparation, Columns):
    """Rows given from Python: a list of dictionaries, or a Dataset or IterableDataset of `datasets`."""

    path: str = field(default="rows", metadata=INTERNAL)
    """name of the rows in messages"""
    _: KW_ONLY
    rows: Iterable[Any]
    """the rows"""
    heldout_rows: Iterable[Any] | None = None
    """held-out rows"""
    heldout: float = 0.0
    """rows held out of `rows` if `heldout_rows` is empty: below 1 a share, from 1 a number; always the same rows"""
    limit: int = 0
    """maximum number of rows; 0 uses all"""

    @property
    def runs_ahead(self) -> bool:
        """True for a list, and for a Dataset that no function of the user's transforms; a stream may be made by one."""
        kind: Mapping[str, Any] = getattr(self.rows, "format", {"type": "custom"})
        return isinstance(self.rows, (list, tuple)) or kind["type"] != "custom"

    @property
    def holds_out(self) -> bool:
        """True if some rows are held out."""
        return self.heldout_rows is not None or self.heldout > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rows in (("rows", self.rows), ("heldout_rows", self.heldout_rows)):
            if isinstance(rows, (str, Mapping)) or hasattr(rows, "__next__"):
                raise OptionError(name, f"is a {type(rows).__name__}; pass a list of dictionaries or a Dataset")

    def __call__(self, split: str) -> Iterable[Example]:
        if split == "heldout" and self.heldout_rows is not None:
            return self._read(self.heldout_rows, "heldout_rows")
        examples = self._read(self.rows, "rows")
        if self.heldout_rows is not None or not self.heldout:
            if split == "heldout":
                raise UsageError(
                    f"no rows are held out: pass {option('heldout', 0.1)} or {option('heldout_rows', 'ROWS')}"
                )
            return examples
        if not isinstance(examples, Sequence):
            raise OptionError(
                "heldout",
                f"needs the number of rows, which a stream does not have; pass {option('heldout_rows', 'ROWS')}",
            )
        train, heldout = hold_out(len(examples), self.heldout)
        return PickedRows.select(examples, heldout if split == "heldout" else train)

    def _read(self, rows: Iterable[Any], name: str) -> Iterable[Example]:
        """The examples of `rows`: of a list all are checked now, of a table the first one."""
        if hasattr(rows, "features"):
            rows = without_decoding(rows)
        first = next(iter(rows), None)
        if first is None:
            raise DataError(f"{name}: there are no rows")
        if not isinstance(first, Mapping):
            raise DataError(
                f"{name}:1: a row should be a dictionary of columns, not {type(first).__name__}; "
                "write {'prompt': …} for each"
            )
        columns = self.find_columns(first, f"{name}:1")
        columns = replace(columns, meta_keys=self.meta_keys or _names(rows, first))
        columns.example(first, f"{name}:1")
        if not hasattr(rows, "__len__"):  # a stream
            if self.unique:
                raise OptionError("unique", "needs all rows in advance; pass a list or a Dataset")
            return limit_rows(StreamRows(rows, columns, name, ""), self.limit)
        examples: Sequence[Example] = TableRows(rows, columns, name, "")
        if isinstance(rows, (list, tuple)):
            examples = list(examples)
        limited = limit_rows(examples, self.limit)
        return drop_duplicates(limited, set()) if self.unique and isinstance(limited, Sequence) else limited


def _names(rows: Iterable[Any], first: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that every row has and that reward functions are called with; the prompt is handed to them anyway."""
    every = set(first)
    if isinstance(rows, (list, tuple)):
        every = every.intersection(*(row for row in rows if isinstance(row, Mapping)))
    return tuple(name for name in first if name in every - {"prompt", "transcript"})
