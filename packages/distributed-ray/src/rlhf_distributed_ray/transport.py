"""Batches through Ray's object store: the rows of each worker, put once, with nothing in them that it does not need.

A node is sent the rows of its own workers, and never a whole batch. Arrays, not tensors, are stored: Ray maps NumPy arrays into
every reader without a copy. Tokens and each extra are separate objects: what several roles read, or one role reads twice
in a step, crosses once, since roles with as many workers share a batch out alike. Prompts, texts, labels and metadata stay with
the controller, but for the rows' datasource, which splits metrics.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.contract.kept_sets import KeptSets, Truncation
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["COLUMNS", "Shipper", "sources_of", "split_groups", "unpack", "with_texts"]

COLUMNS = ("prompt_NL", "prompt_lengths_N", "tokens_NT", "lengths_N", "mask_NT", "group_N")
IMAGES = "images"
KEPT = "kept_sets"
REMEMBERED = 64  # tensors of one step: a few sources and credits with a few extras each

Arrays = Mapping[str, Any]


def unpack(
    packed: Arrays,
    extras: Arrays | None = None,
    step: StepInfo | None = None,
    sources: list[Any] | None = None,
) -> Batch:
    """Packed columns and extras as a batch; texts and labels are empty, and metadata but for the rows' `sources`."""
    n = len(packed[COLUMNS[0]])
    own: dict[str, Any] = {name: torch.from_numpy(packed[name].copy()) for name in COLUMNS}  # Ray's memory is read-only
    whole = Batch(
        prompts=[""] * n,
        texts=[""] * n,
        labels=[None] * n,
        meta=[{} if source is None else {"datasource": source} for source in sources or [None] * n],
        kept_sets=[_from_arrays(each) for each in packed.get(KEPT, ())],
        images=[
            {name: torch.from_numpy(array.copy()) for name, array in each.items()} for each in packed.get(IMAGES, ())
        ],
        **own,
        extras={name: torch.from_numpy(array.copy()) for name, array in (extras or {}).items()},
        step=step or StepInfo(),
    )
    return whole.rows(range(n))  # trimmed to the longest of these rows


def _to_arrays(kept: KeptSets | Truncation) -> Any:
    """Kept sets of a completion as arrays; rules as they are."""
    if isinstance(kept, Truncation):
        return kept
    return kept.counts_T.numpy(), kept.ids_K.numpy(), kept.bits_WB.numpy()


def _from_arrays(packed: Any) -> KeptSets | Truncation:
    """Invert `_to_arrays`."""
    if isinstance(packed, Truncation):
        return packed
    return KeptSets(*(torch.from_numpy(array.copy()) for array in packed))


def sources_of(batch: Batch, rows: list[int]) -> list[Any] | None:
    """The datasource of each of these rows, None for one without; nothing if none has one."""
    sources = [batch.meta[row].get("datasource") for row in rows]
    return None if all(source is None for source in sources) else sources


def with_texts(sample: Mapping[str, Any], batches: Iterable[Batch]) -> dict[str, Any]:
    """A sample that a worker describes (`nonfinite.row_as_dict`) with the texts of its row, which has its prompt's
    number and its tokens."""
    for batch in batches:
        for row, length in enumerate(batch.lengths_N.tolist()):
            uid = int(batch["uids_N"][row]) if "uids_N" in batch else None
            if uid == sample.get("uids_N") and batch.tokens_NT[row, :length].tolist() == sample["tokens"]:
                return {**sample, "prompt": batch.prompts[row], "completion": batch.texts[row]}
    return dict(sample)


class Shipper:
    """Puts the rows of each worker into the object store once, however many roles read them.

    Args:
        put: stores an object and returns its reference; Ray's where absent.
    """

    def __init__(self, put: Callable[[Any], Any] | None = None) -> None:
        self._put = put
        self._sent: OrderedDict[tuple[int, ...], tuple[dict[tuple[int, ...], Any], list[Tensor]]] = OrderedDict()
        """references by rows, and the tensors, which are kept so that their ids stay theirs; by ids and changes of tensors"""
        self.bytes = 0
        """bytes put so far"""
        self._lock = Lock()
        """lock of the threads in which roles are called"""

    def columns(self, batch: Batch, rows: Sequence[int]) -> Any:
        """The reference of the columns of some rows, and of what their model reads for images."""

        def pack() -> dict[str, Any]:
            packed: dict[str, Any] = {name: _rows_of(getattr(batch, name), rows) for name in COLUMNS}
            if batch.images:
                # completions of one prompt share theirs, and pickling keeps that
                seen = {id(batch.images[row]): batch.images[row] for row in rows}
                arrays = {key: {name: tensor.numpy() for name, tensor in each.items()} for key, each in seen.items()}
                packed[IMAGES] = [arrays[id(batch.images[row])] for row in rows]
                self.bytes += sum(array.nbytes for each in arrays.values() for array in each.values())
            if batch.kept_sets:
                packed[KEPT] = [_to_arrays(batch.kept_sets[row]) for row in rows]
                self.bytes += sum(array.nbytes for each in packed[KEPT] if isinstance(each, tuple) for array in each)
            return packed

        return self._put_once([getattr(batch, name) for name in COLUMNS], len(batch.kept_sets), rows, pack)

    def extras(self, batch: Batch, names: Iterable[str], rows: Sequence[int]) -> list[Any]:
        """The references of some rows of the named extras, in their order."""

        def packing(tensor: Tensor) -> Callable[[], dict[str, Any]]:
            return lambda: {"": _rows_of(tensor, rows)}

        return [self._put_once([batch[name]], 0, rows, packing(batch[name])) for name in names]

    def _put_once(
        self, tensors: list[Tensor], kept_sets: int, rows: Sequence[int], pack: Callable[[], dict[str, Any]]
    ) -> Any:
        """The reference of what `pack` returns, which is put unless these rows of these very tensors were."""
        key = (kept_sets, *(number for tensor in tensors for number in (id(tensor), _changes(tensor))))
        with self._lock:
            references, _ = self._sent.setdefault(key, ({}, tensors))
            if tuple(rows) not in references:
                packed = pack()
                self.bytes += sum(packed[name].nbytes for name in packed if name not in (IMAGES, KEPT))
                references[tuple(rows)] = self._store(packed)
            while len(self._sent) > REMEMBERED:
                self._sent.popitem(last=False)
            return references[tuple(rows)]

    def _store(self, packed: Arrays) -> Any:
        if self._put is not None:
            return self._put(packed)
        import ray

        return ray.put(packed)


def _rows_of(tensor: Tensor, rows: Sequence[int]) -> Any:
    """Some rows as an array; all of them, in order, as they are."""
    array = tensor.numpy()
    return array if len(rows) == len(array) and list(rows) == list(range(len(array))) else array[list(rows)]


def _changes(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place. Tensors made in inference mode cannot change outside it."""
    return 0 if tensor.is_inference() else tensor._version


def split_groups(batch: Batch, parts: int) -> list[list[int]]:
    """Row numbers for each of `parts` workers: whole groups, in order, balanced by tokens.

    The longest groups are dealt first, each to the worker with the least so far.
    """
    tokens_N = (batch.prompt_lengths_N + batch.lengths_N).tolist()
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_N.tolist()):
        groups.setdefault(group, []).append(row)
    by_size = sorted(groups.values(), key=lambda rows: -sum(tokens_N[row] for row in rows))
    shares: list[list[int]] = [[] for _ in range(parts)]
    least = [(0, k) for k in range(parts)]  # a heap: a thousand workers are not searched for every group
    for rows in by_size:
        load, k = least[0]
        heapq.heapreplace(least, (load + sum(tokens_N[row] for row in rows), k))
        shares[k] += rows
    return [sorted(rows) for rows in shares]
