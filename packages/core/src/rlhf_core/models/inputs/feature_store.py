"""States of a frozen body in a folder: no row goes through the body twice, in a second epoch, another run or after a kill.

A state belongs to a key of everything that it depends on: the content of the body's weights, the dtype of its forward pass, its
attention, and the row's tokens. So runs of any kind share a folder, and a body that has changed finds nothing old. It is one
SQLite database, written after every micro-batch: several processes may use it, and one that is killed leaves it whole.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.errors import UsageError

__all__ = ["FeatureStore", "body_digest"]

WAIT = 60.0
"""Seconds to wait for another process that writes."""
AT_ONCE = 500
"""Keys a query asks for; SQLite takes at least 999."""

States = tuple[Tensor, Tensor]
"""States of a row's completion tokens (T, H), which may be none, and of its last cell (H,)."""


class FeatureStore:
    """The states of one body in a folder.

    Args:
        folder: where the database is, made if it is not there.

    Raises:
        UsageError: the folder cannot be used.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._path = Path(folder) / "features.sqlite"
        with self._report_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS states "
                    "(key BLOB PRIMARY KEY, dtype TEXT, width INTEGER, bytes BLOB) WITHOUT ROWID"
                )

    def get(self, keys: Sequence[bytes]) -> dict[bytes, States]:
        """Return the states of those rows that are known, by key."""
        found: dict[bytes, States] = {}
        with self._report_errors(), closing(self._open()) as database:
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, dtype, width, bytes FROM states WHERE key IN ({marks})"  # noqa: S608  # marks only
                for key, *row in database.execute(query, some):
                    found[key] = _from_bytes(*row)
        return found

    def put(self, rows: Mapping[bytes, States]) -> None:
        """Add the states of rows; what is known stays."""
        with self._report_errors(), closing(self._open()) as database, database:
            database.executemany(
                "INSERT OR IGNORE INTO states VALUES (?, ?, ?, ?)",
                [(key, *_to_bytes(*row)) for key, row in rows.items()],
            )

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=WAIT)

    @contextmanager
    def _report_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise UsageError(
                f"cannot store features in {self.folder}: {error}; name another folder, or remove the damaged "
                "features.sqlite"
            ) from None


def body_digest(body: Any, compute_dtype: torch.dtype) -> bytes:
    """Return the identity of a body: names and content of weights and buffers, dtype and attention."""
    digest = hashlib.blake2b(digest_size=20)
    text = body.config.get_text_config(decoder=True)
    digest.update(f"{type(body).__name__}/{compute_dtype}/{text._attn_implementation}/{text.to_json_string()}".encode())
    named = [*body.named_parameters(), *body.named_buffers()]
    for name, tensor in sorted(named, key=lambda each: each[0]):
        digest.update(f"/{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        digest.update(_numbers(tensor))
    return digest.digest()


def _numbers(tensor: Tensor) -> Any:
    """Return the memory of a tensor, of any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _to_bytes(states_TH: Tensor, last_H: Tensor) -> tuple[str, int, bytes]:
    """Return dtype, width and memory of a row's states, the last cell's first."""
    together = torch.cat([last_H[None], states_TH.to(last_H.dtype)])
    return str(last_H.dtype).removeprefix("torch."), len(last_H), bytes(_numbers(together))


def _from_bytes(dtype: str, width: int, content: bytes) -> States:
    together = torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(-1, width)
    return together[1:].clone(), together[0].clone()
