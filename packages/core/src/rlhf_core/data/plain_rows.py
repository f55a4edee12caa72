"""Rows that need no full check: every column that is read is plain text, so that `Columns.example` accepts them for sure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from rlhf_core.data.chats import DIALOGUE, is_dialogue
from rlhf_core.data.columns import Columns

__all__ = ["PlainCheck"]

Names = tuple[Any, ...]
FEW = 8
"""Rows that are not worth a look at all of them together."""


class PlainCheck:
    """Returns True for rows that `columns.example` accepts; False makes no statement about a row.

    Args:
        columns: with every key filled in (`Columns.infer_columns`).
    """

    def __init__(self, columns: Columns) -> None:
        self.shapes: dict[Names, tuple[tuple[str, ...], tuple[str, ...]] | None] = {}
        """by the names of a row: columns that are text and no dialogue, and those that are text; None if a row needs more"""
        prompts, texts = [columns.prompt_key], [columns.completion_key] if columns.completion_key else []
        if columns.text_key:
            prompts, texts = [], [columns.text_key]
        elif columns.chosen_key:
            prompts, texts = [columns.prompt_key, columns.chosen_key, columns.rejected_key], []
        self._prompts, self._texts = tuple(prompts), tuple(texts)
        self._expected = tuple(key for key in (columns.label_key, *columns.meta_keys) if key)
        before = (columns.system_key, columns.context_key, "input" if columns.prompt_key == "instruction" else "")
        self._optional = tuple(key for key in before if key)
        self._absent = {"tools", *([columns.history_key] if columns.history_key else [])}
        paths = any("/" in value for name, value in vars(columns).items() if name.endswith("_key"))
        images = columns.images_key not in ("", "none")
        self._never = paths or images or bool(columns.number_keys) or not all((*self._prompts, *self._texts))

    def __call__(self, row: Any) -> bool:
        if type(row) is not dict:
            return False
        names = tuple(row)
        if names not in self.shapes:
            self.shapes[names] = self._plan(names)
        plan = self.shapes[names]
        if plan is None:
            return False
        prompts, texts = plan
        for key in texts:
            if type(row[key]) is not str:
                return False
        for key in prompts:
            value = row[key]
            if type(value) is not str or is_dialogue(value):
                return False
        return True

    def accepts(self, rows: Sequence[Any]) -> bool:
        """Return True for rows of which each is accepted; several at a time cost less than one by one."""
        if len(rows) < FEW:
            return all(self(row) for row in rows)
        if set(map(type, rows)) != {dict}:
            return False
        shapes = _shapes(rows)
        for names in shapes:
            if names not in self.shapes:
                self.shapes[names] = self._plan(names)
        plans = {self.shapes[names] for names in shapes}
        plan = plans.pop()
        if plan is None or plans:
            return False
        prompts, texts = (_columns(rows, names) for names in plan)
        return set(map(type, prompts + texts)) == {str} and DIALOGUE not in "".join(prompts)

    def _plan(self, names: Names) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        known = set(names)
        if self._never or not known.issuperset((*self._prompts, *self._texts, *self._expected)) or known & self._absent:
            return None
        return self._prompts, (*self._texts, *(key for key in self._optional if key in known))


def _shapes(rows: Sequence[dict[Any, Any]]) -> Collection[Names]:
    """Return the different names of rows, in order; a tuple per row is made only if there are several."""
    try:
        if all(len(set(names_N)) == 1 for names_N in zip(*rows, strict=True)):
            return (tuple(rows[0]),)
    except ValueError:  # rows of unlike length
        pass
    return dict.fromkeys(map(tuple, rows))


def _columns(rows: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Return the values of some columns of all rows."""
    if not names:
        return []
    found = map(itemgetter(*names), rows)
    return list(found) if len(names) == 1 else list(chain.from_iterable(found))
