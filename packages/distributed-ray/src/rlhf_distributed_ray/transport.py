"""Batches through Ray's object store: put once, read in slices, and nothing in them that the reader does not need.

Arrays, not tensors, are stored: Ray maps NumPy arrays into every reader without a copy, so a worker copies its own rows
only. Tokens and each extra are objects of their own: what several roles read, or one role reads twice in a step, crosses
once. Prompts, texts, labels and metadata stay with the controller, but for the rows' datasource, which splits metrics.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.contract.kept_sets import KeptSets, Truncation
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.models.inputs.images import Images

__all__ = ["COLUMNS", "Shipper", "sources_of", "split_groups", "unpack", "with_texts"]

COLUMNS = ("prompt_NL", "prompt_lengths_N", "tokens_NT", "lengths_N", "mask_NT", "group_N")
IMAGES = "images"
KEPT = "kept_sets"
REMEMBERED = 64  # objects of one step: a few sources and credits with a few extras each

Arrays = Mapping[str, Any]


def unpack(
    packed: Arrays,
    rows: list[int],
    extras: Arrays | None = None,
    step: StepInfo | None = None,
    sources: list[Any] | None = None,
) -> Batch:
    """Rows of packed columns and extras as a batch; texts and labels are empty, and metadata but for the rows' `sources`."""
    index = torch.tensor(rows, dtype=torch.long).numpy()

    def column(array: Any) -> Tensor:
        return torch.from_numpy(array[index])  # the copy of these rows, and only these

    n = len(rows)
    own: dict[str, Any] = {name: column(packed[name]) for name in COLUMNS}
    seen, kept = packed.get(IMAGES, ()), packed.get(KEPT, ())
    whole = Batch(
        prompts=[""] * n,
        texts=[""] * n,
        labels=[None] * n,
        meta=[{} if source is None else {"datasource": source} for source in sources or [None] * n],
        kept_sets=[_from_arrays(kept[row]) for row in rows if kept],
        images=[{name: torch.from_numpy(array.copy()) for name, array in seen[row].items()} for row in rows if seen],
        **own,
        extras={name: column(array) for name, array in (extras or {}).items()},
        step=step or StepInfo(),
    )
    return whole.rows(range(n))  # trimmed to the longest of these rows


def _to_arrays(kept: KeptSets | Truncation) -> Any:
    """Kept sets of a completion as arrays; rules as they are."""
    if isinstance(kept, Truncation):
        return kept
    return kept.counts_T.numpy(), kept.ids_K.numpy(), kept.bits_WB.numpy()


def _from_arrays(packed: Any) -> KeptSets | Truncation:
    """What `_to_arrays` was given."""
    if isinstance(packed, Truncation):
        return packed
    return KeptSets(*(torch.from_numpy(array.copy()) for array in packed))


def sources_of(batch: Batch, rows: list[int]) -> list[Any] | None:
    """The datasource of each of these rows, None for one that does not say; nothing where none does."""
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
    """Puts each tensor into the object store once, however many roles read it.

    Args:
        put: stores an object and returns its reference; Ray's where absent.
    """

    def __init__(self, put: Callable[[Any], Any] | None = None) -> None:
        self._put = put
        self._sent: OrderedDict[tuple[int, ...], tuple[Any, list[Tensor]]] = OrderedDict()
        self.bytes = 0
        """bytes put so far"""
        self._lock = Lock()
        """of the threads in which roles are called"""

    def columns(self, batch: Batch) -> Any:
        """The reference of the batch's columns, and of what its model reads for images."""
        return self._put_once([getattr(batch, name) for name in COLUMNS], COLUMNS, batch.images, batch.kept_sets)

    def extras(self, batch: Batch, names: Iterable[str]) -> list[Any]:
        """The references of the named extras, in their order."""
        return [self._put_once([batch[name]], ("",)) for name in names]

    def _put_once(
        self,
        tensors: list[Tensor],
        names: tuple[str, ...],
        images: Sequence[Images] = (),
        kept_sets: Sequence[KeptSets | Truncation] = (),
    ) -> Any:
        """The reference of arrays of `tensors` under these names, put unless these very tensors were."""
        key = (len(kept_sets), *(number for tensor in tensors for number in (id(tensor), _changes(tensor))))
        with self._lock:
            return self._remember(key, tensors, names, images, kept_sets)

    def _remember(
        self,
        key: tuple[int, ...],
        tensors: list[Tensor],
        names: tuple[str, ...],
        images: Sequence[Images],
        kept_sets: Sequence[KeptSets | Truncation],
    ) -> Any:
        """The reference of what is known by `key`, put if it is not."""
        if key not in self._sent:
            packed: dict[str, Any] = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            self.bytes += sum(array.nbytes for array in packed.values())
            if images:
                # completions of one prompt share theirs, and pickling keeps that
                arrays = {id(row): {name: tensor.numpy() for name, tensor in row.items()} for row in images}
                packed[IMAGES] = [arrays[id(row)] for row in images]
                self.bytes += sum(array.nbytes for row in arrays.values() for array in row.values())
            if kept_sets:
                packed[KEPT] = [_to_arrays(each) for each in kept_sets]
                self.bytes += sum(array.nbytes for row in packed[KEPT] if isinstance(row, tuple) for array in row)
            self._sent[key] = (self._store(packed), tensors)  # the tensors are kept so that their ids stay theirs
            while len(self._sent) > REMEMBERED:
                self._sent.popitem(last=False)
        return self._sent[key][0]

    def _store(self, packed: Arrays) -> Any:
        if self._put is not None:
            return self._put(packed)
        import ray

        return ray.put(packed)


def _changes(tensor: Tensor) -> int:
    """How often a tensor was changed in place; one made in inference mode cannot be outside it."""
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
    loads, shares = [0] * parts, [[] for _ in range(parts)]  # type: tuple[list[int], list[list[int]]]
    for rows in by_size:
        least = min(range(parts), key=lambda k: (loads[k], k))
        loads[least] += sum(tokens_N[row] for row in rows)
        shares[least] += rows
    return [sorted(rows) for rows in shares]
