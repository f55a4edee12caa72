"""Rows made ready for the loop: templated, tokenized and measured, in several processes or out of a cache if asked.

    stream  ──examples──▶  Preparer  ──rows──▶  Prefetcher  ──batches──▶  loop

The result for a row depends on its prompt and completions, the tokenizer and the template, and on nothing else; lengths are
checked afterwards, so that other limits find the same rows in the cache. A row that cannot be rendered is handed on as the
error it is, for the stream to raise when its turn comes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.options import FREE
from rlhf_core.contract.providers import Data
from rlhf_core.data.cache import RowCache
from rlhf_core.data.render import Encoding
from rlhf_core.errors import DataError, OptionError

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.data.encoder import Encoder
    from rlhf_core.data.rows import TokenizedRow
    from rlhf_core.util.worker_processes import Workers

__all__ = ["Preparation", "Preparer"]

SHARE = 64
"""Rows a process is given at a time."""
TARGET = "rlhf_core.data.prepare:_in_worker"
"""Function that worker processes run."""


@dataclass(frozen=True)
class Preparation(Data):
    """Base class of readers: turns their rows into tokens."""

    _: KW_ONLY
    encoding: Encoding = Encoding()
    """conversion of rows to tokens"""
    preview: int = field(default=0, metadata=FREE)
    """number of rows to print as the model reads them, with trained tokens in color (or in « » without color)"""
    cache: str = field(default="", metadata=FREE)
    """folder that caches tokenized rows for later and concurrent runs; empty caches nothing"""
    workers: int = field(default=0, metadata=FREE)
    """number of processes that template and tokenize; 0 uses a background thread"""

    def __post_init__(self) -> None:
        counts = {
            "preview",
            "workers",
            "limit",
            "limit_each",
            "shuffle_buffer",
            "max_images",
        }  # of whichever reader this is
        for each in fields(self):
            if each.name in counts and getattr(self, each.name) < 0:
                raise OptionError(each.name, f"must be at least 0, not {getattr(self, each.name)}")


class Preparer:
    """Turns examples into rows.

    Args:
        encoder: of the role that reads them.
        online: prepare prompts only, for completions to be sampled.
        data: the data provider, whose `cache` and `workers` hold if it is a `Preparation`.
    """

    def __init__(self, encoder: Encoder, online: bool, data: Data | None = None) -> None:
        self._encoder, self._online = encoder, online
        folder = data.cache if isinstance(data, Preparation) else ""
        self._cache = RowCache(folder, encoder.fingerprint()) if folder else None
        self._count = data.workers if isinstance(data, Preparation) else 0
        self._workers: Workers | None = None

    @property
    def block(self) -> int:
        """Return how many examples to pass at a time."""
        return self._count * SHARE or 1

    def __call__(self, examples: Sequence[Example]) -> list[TokenizedRow | DataError | None]:
        """For each example its row, None if it is too long, or what is wrong with it."""
        bare = [_row_inputs(example, self._online) for example in examples]
        keys = [self._cache.key(example) for example in bare] if self._cache else []
        known = self._cache.get(keys) if self._cache else {}
        # without completions there is a prompt's row in the cache, if any, and that is none to train on
        missing = [
            i for i, e in enumerate(bare) if not (known and keys[i] in known and (self._online or e.completions))
        ]
        made = dict(zip(missing, self._encode_all([bare[i] for i in missing])))
        if self._cache:
            kept = {keys[i]: row for i, row in made.items() if not isinstance(row, DataError)}
            self._cache.put({key: row for key, row in kept.items() if not row.images})  # pixels are larger than images
        rows = [made[i] if i in made else known[keys[i]] for i in range(len(bare))]
        return [row if isinstance(row, DataError) else self._encoder.truncate(row) for row in rows]

    def _encode_all(self, examples: Sequence[Example]) -> list[TokenizedRow | DataError]:
        if not self._count or len(examples) < 2:
            return _rows(self._encoder, examples, self._online)
        if self._workers is None:
            from rlhf_core.util.worker_processes import Workers

            encoder = self._encoder
            made_of = (encoder.tokenizer, encoder.encoding, encoder.reader, encoder.listed_ends)
            self._workers = Workers(self._count, TARGET, made_of)
        size = min(SHARE, -(-len(examples) // self._count))
        calls = [(examples[at : at + size], self._online) for at in range(0, len(examples), size)]
        rows: list[TokenizedRow | DataError] = []
        for (part, _), answer in zip(calls, self._workers.map(calls, timeout=0)):
            # a process that died is no statement about the rows: they are prepared here
            rows += answer if isinstance(answer, list) else _rows(self._encoder, part, self._online)
        return rows

    def close(self) -> None:
        """End the processes and close the cache."""
        if self._workers is not None:
            self._workers.close()
        if self._cache is not None:
            self._cache.close()


def _row_inputs(example: Example, online: bool) -> Example:
    """Return what the row depends on, with its position for messages."""
    tools = {"tools": example.meta["tools"]} if "tools" in example.meta else {}
    completions = () if online else example.completions
    return replace(example, label=None, meta=tools, fields={}, completions=completions)


def _rows(encoder: Encoder, examples: Sequence[Example], online: bool) -> list[TokenizedRow | DataError]:
    """The rows at full length."""
    rows: list[TokenizedRow | DataError] = []
    for example in examples:
        try:
            rows.append(encoder.prompt_row(example) if online else encoder.row(example))
        except DataError as error:
            rows.append(error)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# inside a process
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def _encode_here() -> dict[str, Any]:
    return {}


def prepare_worker(tokenizer: Any, encoding: Encoding, reader: Any, listed_ends: Sequence[int]) -> None:
    """Build this process's encoder, once."""
    from rlhf_core.data.encoder import Encoder

    _encode_here()["encoder"] = Encoder(tokenizer, encoding=encoding, reader=reader, listed_ends=listed_ends)


def _in_worker(examples: Sequence[Example], online: bool) -> list[TokenizedRow | DataError]:
    return _rows(_encode_here()["encoder"], examples, online)
