"""Cache the outputs of a frozen role on rows of data in a folder, for later epochs and other runs.

A value belongs to a key of everything that it depends on: the role's options, the files of its model and of what that adapts
(names, sizes, times of change; of a hub name the revision), the temperature, the output's name, and the tokens of prompt and
completion. So a folder may be shared by runs of any kind. It is one SQLite database: several processes may use it, and one that
is killed leaves it whole.

The values are those of the first time they were computed, float32. The model is placed all the same.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.kept_sets import KeptSets, Truncation
from rlhf_core.contract.requirements import letters, per_token, shape_of
from rlhf_core.contract.roles import Role
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.roles import Placement

__all__ = ["CachedRole", "cache_frozen_roles"]

WAIT = 60.0
"""Seconds to wait for another process that writes."""
AT_ONCE = 500
"""Keys a query asks for; SQLite takes at least 999."""


def cache_frozen_roles(placed: Placement, plan: Plan) -> None:
    """Let frozen roles remember, if the algorithm names a folder for that (its field `cache`)."""
    folder = plan.config.algorithm.cache
    for name in plan.roles:
        if folder and name not in plan.changing_roles:
            placed.roles[name] = CachedRole(placed.roles[name], folder, placed.world)


class CachedRole(Role):
    """A frozen role that remembers; everything but `infer` is the role's own.

    Args:
        role: the role.
        folder: where the database is, made if it is not there.
        world: the ranks that ask together.
    """

    def __init__(self, role: Role, folder: str, world: Any) -> None:
        self._role, self._world = role, world
        self._path = Path(folder) / "outputs.sqlite"
        self._identity = _identity(role.spec)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS outputs (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise UsageError(
                f"cannot store outputs of the role {role.name} in {folder}: {error}; name another folder"
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._role, name)

    @property
    def tokenizer(self) -> Any:
        return self._role.tokenizer

    def train(self, work: Mapping[str, Batch]) -> dict[str, float]:
        return self._role.train(work)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._role.weights()

    def save(self, folder: str) -> None:
        self._role.save(folder)

    def snapshot(self) -> Callable[[str], None] | None:
        return self._role.snapshot()

    def load(self, folder: str) -> None:
        self._role.load(folder)

    def export(self, folder: str) -> None:
        self._role.export(folder)

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, Tensor]:
        """The wanted outputs of all rows, computed where they are not known. Ranks that know all go along with the others."""
        keys = {name: [self._key(batch, i, name) for i in range(len(batch))] for name in names}
        known = self._get([key for column in keys.values() for key in column])
        missing = [i for i in range(len(batch)) if any(keys[name][i] not in known for name in names)]
        if any(self._world.gather(bool(missing))):
            rows = missing or [0]
            fresh = self._role.infer(batch if len(rows) == len(batch) else batch.rows(rows), names)
            new = {keys[name][i]: _bytes(fresh[name][k], batch, i, name) for name in names for k, i in enumerate(rows)}
            self._put(new)
            known = new | known
        return {name: _tensor([known[key] for key in keys[name]], batch, name) for name in names}

    def _key(self, batch: Batch, i: int, name: str) -> bytes:
        """Return the key of one output of one row."""
        digest = hashlib.blake2b(f"{self._identity}/{name}/".encode(), digest_size=20)
        L, T = int(batch.prompt_lengths_N[i]), int(batch.lengths_N[i])
        digest.update(
            f"{L}/".encode() + batch.prompt_NL[i, :L].numpy().tobytes() + batch.tokens_NT[i, :T].numpy().tobytes()
        )
        if batch.kept_sets:  # of a frozen role that sampled them: its log-probabilities are over them
            digest.update(_kept_bytes(batch.kept_sets[i]))
        for image, tensor in sorted(batch.images[i].items()) if batch.images else ():
            digest.update(f"{image}/{tuple(tensor.shape)}/".encode() + tensor.numpy().tobytes())
        return digest.digest()

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=WAIT)

    def _get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        with closing(self._open()) as database:
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(some))
                found |= dict(database.execute(f"SELECT key, value FROM outputs WHERE key IN ({marks})", some))  # noqa: S608  # question marks only
        return found

    def _put(self, values: dict[bytes, bytes]) -> None:
        with closing(self._open()) as database, database:
            database.executemany("INSERT OR IGNORE INTO outputs VALUES (?, ?)", values.items())


def _identity(spec: Any) -> str:
    """Everything but a row that the outputs depend on."""
    stamps = [
        (path.parent.name, path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in _model_files(spec.options)
    ]
    return f"{spec.options!r}/{spec.temperature}/{stamps}"


def _model_files(options: Any) -> list[Path]:
    """The files of a role's model, of the model that it adapts if it is an adapter, and of its further tokens. Those of a hub
    name are the downloaded ones, in a folder named by their revision."""
    from rlhf_core.models.loading.adapters import read_base_model
    from rlhf_core.models.loading.hub import find_companion_file, resolve_name

    source = resolve_name(options.model)
    models = [options.model, *([read_base_model(Path(source.location))] if source.kind == "adapter" else [])]
    found = [Path(options.add_tokens)] if options.add_tokens else []
    for name in models:
        config = find_companion_file(name, "config.json") or find_companion_file(name, "adapter_config.json")
        folder = config.parent if config else Path(name)
        found += [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return found


def _kept_bytes(kept: KeptSets | Truncation) -> bytes:
    """One row's kept sets, or the rules for them."""
    if isinstance(kept, Truncation):
        return repr(kept).encode()
    return b"/".join(tensor.numpy().tobytes() for tensor in (kept.counts_T, kept.ids_K, kept.bits_WB))


def _bytes(value: Tensor, batch: Batch, i: int, name: str) -> bytes:
    """One row's output without padding."""
    return (value[: int(batch.lengths_N[i])] if per_token(name) else value).numpy().tobytes()


def _tensor(values: list[bytes], batch: Batch, name: str) -> Tensor:
    """Rows' outputs as `infer` gives them."""
    lengths_N = batch.lengths_N.tolist()
    rows = [torch.frombuffer(bytearray(value), dtype=torch.float32) for value in values]
    if not per_token(name):
        return torch.stack(rows).view(shape_of(name, (len(rows), 0), (-1,) * (len(letters(name)) - 1)))
    rows = [row.view(length, *(-1,) * (len(letters(name)) - 2)) for row, length in zip(rows, lengths_N, strict=True)]
    found = torch.zeros(shape_of(name, batch.tokens_NT.shape, rows[0].shape[1:]))
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found
