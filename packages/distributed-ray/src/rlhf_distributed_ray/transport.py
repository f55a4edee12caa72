"""Batches through Ray's object store: put once, read in slices, and nothing in them that the reader does not need.

Arrays, not tensors, are stored: Ray maps NumPy arrays into every reader without a copy, so a worker copies its own rows
only. Prompts, texts, labels and metadata stay with the controller.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.types import Batch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Shipper", "pack", "split_groups", "unpack"]

COLUMNS = ("prompt_NL", "prompt_lengths_N", "tokens_NT", "lengths_N", "mask_NT", "group_N")
REMEMBERED = 8  # batches of one step: a few sources and credits


def pack(batch: Batch, extras: Iterable[str]) -> dict[str, Any]:
    """The numbers of a batch as arrays, with the named extras."""
    columns = {name: getattr(batch, name).numpy() for name in COLUMNS}
    return {"columns": columns, "extras": {n: batch[n].numpy() for n in extras}, "scalars": dict(batch.scalars)}


def unpack(packed: Mapping[str, Any], rows: list[int]) -> Batch:
    """Rows of a packed batch; texts and labels are empty."""
    index = torch.tensor(rows)

    def column(array: Any) -> Tensor:
        return torch.from_numpy(array[index.numpy()])  # the copy of these rows, and only these

    n = len(rows)
    columns: dict[str, Any] = {name: column(array) for name, array in packed["columns"].items()}
    whole = Batch(
        prompts=[""] * n,
        texts=[""] * n,
        labels=[None] * n,
        meta=[{}] * n,
        **columns,
        extras={name: column(array) for name, array in packed["extras"].items()},
        scalars=dict(packed["scalars"]),
    )
    return whole.rows(range(n))  # trimmed to the longest of these rows


class Shipper:
    """Puts each batch into the object store once, however many roles read it."""

    def __init__(self) -> None:
        self._sent: OrderedDict[tuple[int, ...], tuple[Any, list[Tensor]]] = OrderedDict()
        self.bytes = 0
        """bytes put so far"""

    def send(self, batch: Batch, extras: Iterable[str] = ()) -> Any:
        """The object reference of `batch` with the named extras."""
        import ray

        names = sorted(set(extras))
        tensors = [batch.tokens_NT, batch.group_N, *(batch[name] for name in names)]
        key = tuple(map(id, tensors))
        if key not in self._sent:
            packed = pack(batch, names)
            self.bytes += sum(a.nbytes for part in ("columns", "extras") for a in packed[part].values())
            self._sent[key] = (ray.put(packed), tensors)  # the tensors are kept so that their ids stay theirs
            while len(self._sent) > REMEMBERED:
                self._sent.popitem(last=False)
        return self._sent[key][0]


def split_groups(batch: Batch, parts: int) -> list[list[int]]:
    """Row numbers for each of `parts` workers: whole groups, in order, balanced by tokens.

    The longest groups are dealt first, each to the worker with the least so far.
    """
    tokens_N = (batch.prompt_lengths_N + batch.lengths_N).tolist()
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_N.tolist()):
        groups.setdefault(group, []).append(row)
    by_size = sorted(groups.values(), key=lambda rows: -sum(tokens_N[row] for row in rows))
    loads, shares = [0] * parts, [[] for _ in range(parts)]  # type: tuple[list[int], list[list[int]]]
    for rows in by_size:
        least = min(range(parts), key=lambda k: (loads[k], k))
        loads[least] += sum(tokens_N[row] for row in rows)
        shares[least] += rows
    return [sorted(rows) for rows in shares]
