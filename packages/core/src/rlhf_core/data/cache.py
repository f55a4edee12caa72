"""Tokenized rows on the disk, for later runs: one SQLite file for each tokenizer and template.

A row is found by what it holds, so other orders, mixtures, caps and limits of the same data use it too. Runs may share a
folder at the same time and be killed at any moment: what a transaction did not finish is not there, and a row whose checksum
does not hold counts as absent. Rows are JSON and arrays, never pickled. They are written about once a second; a run that is
killed may lose those of its last second. Nothing waits for the disk: a machine that loses its power may leave a damaged file.

Rows are in the order in which they came, and an index next to them has their keys. In the tree of keys itself each row
would go to its own page, which is read and written again for every row.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError, UsageError, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.data.rows import TokenizedRow

__all__ = ["RowCache"]

CHECK = 8
"""Bytes of the checksum before each row."""
PATIENCE = 60.0
"""Seconds to wait for another run that writes."""
PAUSE = 1.0
"""Seconds from one transaction to the next."""
WAITING = 20_000
"""Rows that wait for a transaction at most."""
ASKED = 500
"""Keys in one question, below SQLite's smallest limit."""
HEAD = 4
"""Bytes that hold the length of a row's JSON."""
NUMBER = "I"
"""Type of a token in a file: 4 bytes, the lowest first."""


class RowCache:
    """Rows by their content.

    Args:
        folder: where the file is; made if absent.
        fingerprint: of the tokenizer and template, the file's name.

    Raises:
        UsageError: the folder cannot be written, or the file is damaged.
    """

    def __init__(self, folder: str, fingerprint: str) -> None:
        self._path = Path(folder) / f"rows-{fingerprint}.sqlite"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError("/data.cache", f"{folder}: {error.strerror}; name a writable folder") from None
        self._open: sqlite3.Connection | None = None
        self._waiting: dict[bytes, bytes] = {}
        self._written = time.monotonic()
        self._execute("CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, row BLOB NOT NULL)")

    def key(self, example: Example) -> bytes:
        """Hash everything that the example's row depends on, in 16 bytes."""
        content = [example.prompt, example.completions, example.meta.get("tools")]
        return hashlib.blake2b(json.dumps(content, default=repr).encode(), digest_size=16).digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, TokenizedRow]:
        """The rows that are there."""
        found = {key: _row(self._waiting[key]) for key in keys if key in self._waiting}
        for at in range(0, len(keys), ASKED):
            part = keys[at : at + ASKED]
            marks = ",".join("?" * len(part))
            for key, stored in self._execute(f"SELECT key, row FROM rows WHERE key IN ({marks})", part):  # noqa: S608  # question marks only
                if stored[:CHECK] == _check(key, stored):
                    found[key] = _row(stored)
        return found

    def put(self, rows: Mapping[bytes, TokenizedRow]) -> None:
        """Keep rows. They are written when a second has passed, when there are many, or when the cache is closed."""
        self._waiting |= {key: _to_bytes(key, row) for key, row in rows.items()}
        if time.monotonic() - self._written > PAUSE or len(self._waiting) > WAITING:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait, all of them or none."""
        if self._waiting:
            self._execute("INSERT OR REPLACE INTO rows VALUES (?, ?)", [*self._waiting.items()], many=True)
        self._waiting.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        """Write what waits, and close the file."""
        self.flush()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _execute(self, statement: str, values: Sequence[Any] = (), many: bool = False) -> list[Any]:
        try:
            if self._open is None:  # used by one thread at a time, though not always by the same
                self._open = sqlite3.connect(self._path, timeout=PATIENCE, check_same_thread=False)
                self._open.execute("PRAGMA synchronous = OFF")
            with self._open:  # a transaction
                run = self._open.executemany if many else self._open.execute
                return run(statement, values).fetchall()
        except sqlite3.Error as error:
            self._waiting.clear()
            self._disconnect()
            raise UsageError(f"{run_option('data.cache')}: {self._path} cannot be used ({error}); remove it") from None


def _check(key: bytes, stored: bytes) -> bytes:
    return hashlib.blake2b(memoryview(stored)[CHECK:], digest_size=CHECK, key=key).digest()


def _to_bytes(key: bytes, row: TokenizedRow) -> bytes:
    """A checksum, the length of the JSON, the JSON, and then tokens and masks in the order in which it names their lengths."""
    sides = row.completions
    head = [row.text, len(row.ids), row.opening, [[side.text, len(side.ids), len(side.mask)] for side in sides]]
    text = json.dumps(head).encode()
    tokens = array(NUMBER, row.ids)
    for side in sides:
        tokens.extend(side.ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    masks = b"".join(bytes(side.mask) for side in sides)
    data = b"".join((bytes(CHECK), len(text).to_bytes(HEAD, "little"), text, tokens.tobytes(), masks))
    return _check(key, data) + data[CHECK:]


def _row(stored: bytes) -> TokenizedRow:
    from rlhf_core.data.rows import TokenizedCompletion, TokenizedRow

    begin = CHECK + HEAD
    at = begin + int.from_bytes(stored[CHECK:begin], "little")
    text, length, opening, sides = json.loads(stored[begin:at])
    tokens = array(NUMBER)
    end = at + tokens.itemsize * (length + sum(ids for _, ids, _ in sides))
    tokens.frombytes(stored[at:end])
    if sys.byteorder == "big":
        tokens.byteswap()
    numbers, masks = tokens.tolist(), stored[end:]
    at, end = length, 0
    completions = []
    for said, ids, mask in sides:
        completions.append(TokenizedCompletion(said, numbers[at : at + ids], [*map(bool, masks[end : end + mask])]))
        at, end = at + ids, end + mask
    return TokenizedRow(text, numbers[:length], tuple(completions), opening)
