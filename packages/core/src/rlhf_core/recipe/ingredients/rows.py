"""The ingredient `rows`: rows of any data provider, or of an earlier step, as a file; all of them, a slice, or the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from rlhf_core.config.provider_spec import make_from_spec
from rlhf_core.contract.batch import Example
from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import DataError, OptionError
from rlhf_core.util.atomic_files import write_text

__all__ = ["Rows", "slice_of"]


@dataclass(frozen=True)
class Rows(Ingredient):
    """Write rows of data to a file: all, a slice, or the first ones."""

    data: str = "prompts"
    """data provider and its options, such as "hf path=NAME"; unused if the step reads `rows`"""
    split: str = "train"
    """split of the data provider: train or heldout"""
    part: str = "0/1"
    """`t/T`: slice number t of T equal slices, from 0; rows that remain after T slices are in none"""
    most: int = 0
    """maximum number of rows of the slice, taken from its first; 0 takes all"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"rows": "dataset"}
    optional: ClassVar[frozenset[str]] = frozenset({"rows"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"rows": "dataset"}

    def __post_init__(self) -> None:
        t, _, total = self.part.partition("/")
        if not (t.isdigit() and total.isdigit() and int(t) < int(total)):
            raise OptionError("part", f"must be t/T with t from 0 to T - 1, such as 0/4, not {self.part!r}")
        if self.most < 0:
            raise OptionError("most", f"must be at least 0, not {self.most}")

    def check(self) -> None:
        """Check that there is such a data provider with such options.

        Raises:
            UsageError: there is none.
        """
        make_from_spec("data", self.data, "data")

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Write them.

        Raises:
            DataError: there are no rows in the slice.
        """
        lines = self._lines(context)
        t, _, total = self.part.partition("/")
        chosen = slice_of(lines, int(t), int(total))[: self.most or None]
        if not chosen:
            raise DataError(f"slice {self.part} of {len(lines)} rows is empty; use fewer slices, or more rows")
        path = context.folder / "rows.jsonl"
        write_text(path, "".join(line + "\n" for line in chosen))
        return {"rows": Artifact("dataset", path)}

    def _lines(self, context: IngredientContext) -> list[str]:
        """Return the rows as lines of JSON."""
        if "rows" in context.inputs:
            text = context.inputs["rows"].path.read_text(encoding="utf-8")
            return [line for line in text.split("\n") if line.strip()]
        data = make_from_spec("data", self.data, "data")
        needed = 0 if self.part != "0/1" else self.most  # a slice needs the number of all rows
        return [json.dumps(_row(each), ensure_ascii=False) for each in islice(data(self.split), needed or None)]


def slice_of(rows: Sequence[Any], t: int, total: int) -> Sequence[Any]:
    """Return slice `t` of `total` equal ones; the remainder of the division is in none.

    Deployment in rounds slices a set of prompts so (arXiv 2502.07193, released code).
    """
    length = len(rows) // total
    return rows[t * length : (t + 1) * length]


def _row(example: Example) -> dict[str, Any]:
    """Return a row as the data provider `json` reads it."""
    row: dict[str, Any] = {"prompt": _plain(example.prompt)}
    answers = [_plain(each) for each in example.completions]
    row |= dict(zip(("completion",) if len(answers) == 1 else ("chosen", "rejected"), answers))
    if example.label is not None:
        row["label"] = example.label
    return row | dict(example.fields) | {name: value for name, value in example.meta.items() if name not in row}


def _plain(text: Any) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]
