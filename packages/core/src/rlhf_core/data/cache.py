"""Tokenised rows on the disk, for later runs: one SQLite file for each tokenizer and template.

A row is found by what it holds, so other orders, mixtures, caps and limits of the same data use it too. Runs may share a
folder at the same time and be killed at any moment: what a transaction did not finish is not there, and a row whose checksum
does not hold counts as absent. Rows are JSON, never pickled. They are written about once a second, since each transaction waits
for the disk; a run that is killed may lose those of its last second.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
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
            raise OptionError("/data.cache", f"{folder}: {error.strerror}; name a folder that can be written") from None
        self._open: sqlite3.Connection | None = None
        self._waiting: dict[bytes, bytes] = {}
        self._written = time.monotonic()
        self._execute("CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID")

    def key(self, example: Example) -> bytes:
        """Hash everything that the example's row depends on, in 16 bytes."""
        content = [example.prompt, example.completions, example.meta.get("tools")]
        return hashlib.blake2b(json.dumps(content, default=repr).encode(), digest_size=16).digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, TokenizedRow]:
        """The rows that are there."""
        found = {key: _row(self._waiting[key][CHECK:]) for key in keys if key in self._waiting}
        for at in range(0, len(keys), ASKED):
            part = keys[at : at + ASKED]
            marks = ",".join("?" * len(part))
            for key, stored in self._execute(f"SELECT key, row FROM rows WHERE key IN ({marks})", part):  # noqa: S608  # question marks only
                if stored[:CHECK] == _check(stored[CHECK:]):
                    found[key] = _row(stored[CHECK:])
        return found

    def put(self, rows: Mapping[bytes, TokenizedRow]) -> None:
        """Keep rows. They are written when a second has passed, when there are many, or when the cache is closed."""
        self._waiting |= {key: _to_bytes(row) for key, row in rows.items()}
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
            with self._open:  # a transaction
                run = self._open.executemany if many else self._open.execute
                return run(statement, values).fetchall()
        except sqlite3.Error as error:
            self._waiting.clear()
            self._disconnect()
            raise UsageError(f"{run_option('data.cache')}: {self._path} cannot be used ({error}); remove it") from None


def _check(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECK).digest()


def _to_bytes(row: TokenizedRow) -> bytes:
    sides = [[side.text, side.ids, "".join("01"[trained] for trained in side.mask)] for side in row.completions]
    data = json.dumps([row.text, row.ids, row.opening, sides], separators=(",", ":")).encode()
    return _check(data) + data


def _row(data: bytes) -> TokenizedRow:
    from rlhf_core.data.rows import TokenizedCompletion, TokenizedRow

    text, ids, opening, sides = json.loads(data)
    completions = (TokenizedCompletion(said, tokens, [m == "1" for m in mask]) for said, tokens, mask in sides)
    return TokenizedRow(text, ids, tuple(completions), opening)
