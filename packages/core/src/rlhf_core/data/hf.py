"""`--data hf`: everything the `datasets` library reads, one set or a mixture of several.

Sets are memory-mapped, and a row becomes an `Example` when it is drawn: the first row of every set is checked before
the run starts, the others when their turn comes. With `streaming` nothing is downloaded whole, and rows are shuffled
within a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, overload

from rlhf_core.contract.batch import Example
from rlhf_core.data import mixture
from rlhf_core.data.cells import without_nulls
from rlhf_core.data.columns import Columns
from rlhf_core.data.json import hold_out
from rlhf_core.data.prepare import Preparation
from rlhf_core.data.reading import RowReader, example_of
from rlhf_core.errors import DataError, MissingPackage, OptionError, UsageError, option

__all__ = ["HuggingFaceData", "StreamRows", "TableRows", "without_decoding"]

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""Reader of a file, by its ending."""


@dataclass(frozen=True)
class HuggingFaceData(Preparation, Columns):
    """Hugging Face datasets: hub names, saved folders, json, csv, parquet and arrow files, or a mixture of them."""

    path: str
    """hub name (name:config), folder, file, or type@folder (json@./rows); commas separate several"""
    _: KW_ONLY
    split: str = "train"
    """split to train on; slices work too: train[:1000], train[:10%]"""
    heldout_path: str = ""
    """location of the held-out rows, if not `path`; it takes the same forms, and the split is `heldout_split` or
    train"""
    heldout_split: str = ""
    """split of the held-out rows, for example test"""
    heldout: float = 0.0
    """rows held out of `split` if there is no held-out split: below 1 a share, from 1 a number; always the same rows"""
    shares: tuple[float, ...] = ()
    """sampling weight of each set; sets are repeated until all are exhausted. By default sets are concatenated"""
    limit_each: int = 0
    """maximum number of rows of each set; 0 uses all"""
    limit: int = 0
    """maximum number of rows in total; 0 uses all"""
    mix_seed: int = 0
    """seed for drawing rows from the sets of the mixture"""
    streaming: bool = False
    """read rows without loading whole sets, for sets larger than the disk or memory"""
    shuffle_buffer: int = 1000
    """number of rows within which a streamed set is shuffled, anew in each epoch; 0 keeps its order"""

    runs_ahead: ClassVar[bool] = True

    @property
    def holds_out(self) -> bool:
        return bool(self.heldout or self.heldout_path or self.heldout_split)

    def check(self) -> None:
        """Reject a missing file before anything heavy starts; names on the hub are not looked up."""
        super().check()
        for name in self.path.split(","):
            _source(name.strip())

    def __call__(self, split: str) -> Iterable[Example]:
        if split != "heldout":
            return self._part(self._read(self.split), 0) if self.heldout else self._read(self.split)
        if self.heldout_path:
            other = replace(self, path=self.heldout_path, shares=())
            return other._read(self.heldout_split or "train")
        if self.heldout_split:
            return self._read(self.heldout_split)
        if not self.heldout:
            raise UsageError(
                f"no rows are held out: pass {option('heldout_split', 'NAME')}, {option('heldout_path')} or "
                f"{option('heldout', 0.1)}"
            )
        return self._part(self._read(self.split), 1)

    def _read(self, split: str) -> Iterable[Example]:
        """All sets as one."""
        names = [name.strip() for name in self.path.split(",")]
        if self.shares and len(self.shares) != len(names):
            raise OptionError(
                "shares", f"has {len(self.shares)} numbers, but {option('path')} has {len(names)} datasets"
            )
        sets = [mixture.limit_rows(self._set(name, split, mixed=len(names) > 1), self.limit_each) for name in names]
        if self.unique:
            sets = self._distinct(names, sets)
        if len(sets) == 1:
            return mixture.limit_rows(sets[0], self.limit)
        if self.streaming:
            rows = _Again(sets, self.shares, self.mix_seed)
            return mixture.limit_rows(rows, self.limit)
        known = [rows for rows in sets if isinstance(rows, Sequence)]
        if self.shares:
            mixed = mixture.PickedRows(known, *mixture.order([len(rows) for rows in known], self.shares, self.mix_seed))
        else:
            mixed = mixture.concatenate(known)
        return mixture.limit_rows(mixed, self.limit)

    def _set(self, name: str, split: str, mixed: bool) -> Iterable[Example]:
        """One set; in a mixture its rows carry its name as `datasource`."""
        table = without_decoding(_load(name, split, self.streaming))
        first = next(iter(table), None)
        if first is None:
            raise DataError(f"{name}: the split {split!r} has no rows")
        columns: Columns = self.infer_columns(first, f"{name}:1")
        columns.example(first, f"{name}:1")
        source = name if mixed else ""
        return StreamRows(table, columns, name, source) if self.streaming else TableRows(table, columns, name, source)

    def _distinct(self, names: Sequence[str], sets: Sequence[Iterable[Example]]) -> list[Iterable[Example]]:
        """The sets without rows that came before, in any of them."""
        if self.streaming:
            raise OptionError("unique", f"needs all rows in advance: leave out {option('streaming')}")
        seen: set[bytes] = set()
        kept: list[Iterable[Example]] = []
        for name, rows in zip(names, sets):
            assert isinstance(rows, Sequence)
            new = mixture.drop_duplicates(rows, seen)
            if not new:
                raise OptionError(
                    "unique",
                    f"leaves no row of {name}, since earlier datasets contain all of them; leave it out of "
                    f"{option('path')}",
                )
            kept.append(new)
        return kept

    def _part(self, rows: Iterable[Example], part: int) -> Sequence[Example]:
        """The rows that are trained on (0) or held out (1)."""
        if not isinstance(rows, Sequence):
            raise OptionError(
                "heldout",
                f"needs the number of rows, which a stream does not have: use {option('heldout_split')} to stream",
            )
        return mixture.PickedRows.select(rows, hold_out(len(rows), self.heldout)[part])


@dataclass(frozen=True)
class TableRows(Sequence[Example]):
    """The rows of a memory-mapped set, made into examples when they are asked for."""

    table: Any
    columns: Columns
    name: str
    source: str

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> TableRows: ...
    def __getitem__(self, index: int | slice) -> Example | TableRows:
        if isinstance(index, slice):
            return replace(self, table=self.table.select(range(*index.indices(len(self)))))
        return _example(self, self.table[index], index)


@dataclass(frozen=True)
class StreamRows(Iterable[Example]):
    """The rows of a streamed set, in order."""

    table: Any
    columns: Columns
    name: str
    source: str

    def __iter__(self) -> Iterator[Example]:
        return (_example(self, row, number) for number, row in enumerate(self.table))

    def read(self, state: Any = None) -> RowReader:
        """Return a reader of (number, row), from where another one was."""
        return _TableReader(self.table, state)

    def example(self, row: Any) -> Example:
        """Return the example in what a reader gave."""
        number, cells = row
        return _example(self, cells, number)


class _TableReader:
    """Rows of a table in order, one pass at a time.

    Tables of `datasets` know their place: whole shards are passed over without being read.
    """

    def __init__(self, table: Any, state: Any) -> None:
        self._number = 0 if state is None else state["number"]
        self._begun = False
        self._begin = None if state is None else state["table"]
        self._table = table if hasattr(table, "load_state_dict") else None
        if self._table is None:
            self._rows = islice(table, self._number, None)
            return
        self._table.load_state_dict(self._begin)  # None is the start
        self._rows = iter(self._table)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        row = next(self._rows)
        self._begun = True
        self._number += 1
        return self._number - 1, row

    def state(self) -> Any:
        # before its first row, a table has the state of its last reader, and its state keeps changing
        known = self._begun and self._table is not None
        state = deepcopy(self._table.state_dict()) if known else self._begin  # type: ignore[union-attr]
        return {"number": self._number, "table": state}


@dataclass(frozen=True)
class _Again(Iterable[Example]):
    """Streamed sets as one, which can be read again."""

    sets: Sequence[Iterable[Example]]
    shares: tuple[float, ...]
    seed: int

    def __iter__(self) -> Iterator[Example]:
        return map(self.example, self.read())

    def read(self, state: Any = None) -> RowReader:
        """Return a reader of (set, row), from where another one was."""
        return mixture.SetsReader(self.sets, self.shares, self.seed, state)

    def example(self, row: Any) -> Example:
        """Return the example in what a reader gave."""
        number, content = row
        return example_of(self.sets[number], content)


def _example(rows: TableRows | StreamRows, row: Mapping[str, Any], number: int) -> Example:
    example = rows.columns.example(
        {key: without_nulls(value) for key, value in row.items()}, f"{rows.name}:{number + 1}"
    )
    return replace(example, meta={"datasource": rows.source, **example.meta}) if rows.source else example


def _load(name: str, split: str, streaming: bool) -> Any:
    """The split of a set, by whichever way its name asks for.

    Raises:
        UsageError: it cannot be read; the message has the library's reason.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackage("data hf needs a package: pip install 'rlhf-core[datasets]'") from None
    folder = Path(name)
    try:
        if (folder / "state.json").is_file():
            table = datasets.load_from_disk(name)
            return table.to_iterable_dataset() if streaming else table
        if (folder / "dataset_dict.json").is_file():
            splits: Any = datasets.load_from_disk(name)
            if split not in splits:
                raise UsageError(f"{name}: there is no split {split!r}; choose one of {', '.join(splits)}")
            return splits[split].to_iterable_dataset() if streaming else splits[split]
        return datasets.load_dataset(**_source(name), split=split, streaming=streaming)
    except UsageError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise OptionError("path", f"{name}, split {split!r}: {reason}") from error


def without_decoding(table: Any) -> Any:
    """The set with its images as they are stored: the code that tokenizes a row opens them, and names the row in errors."""
    import datasets

    for name, feature in (table.features or {}).items():
        several = isinstance(feature, datasets.List)
        inner = feature.feature if several else feature
        if isinstance(inner, datasets.Image):
            stored = datasets.Image(decode=False)
            table = table.cast_column(name, datasets.List(stored) if several else stored)
    return table


def _source(name: str) -> dict[str, Any]:
    """Arguments of `load_dataset`."""
    kind, at, folder = name.partition("@")
    if at:
        return {"path": kind, "data_dir": folder}
    path = Path(name)
    if path.is_dir():
        return {"path": name}
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    if suffix in BUILDERS:
        if not path.is_file():
            raise OptionError("path", f"{name}: there is no such file")
        return {"path": BUILDERS[suffix], "data_files": name, **({"sep": "\t"} if suffix == ".tsv" else {})}
    hub, _, config = name.partition(":")
    return {"path": hub, **({"name": config} if config else {})}
