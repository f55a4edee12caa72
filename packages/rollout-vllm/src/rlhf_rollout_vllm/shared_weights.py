"""Memory that holds a model's weights for other processes of this machine, in buckets.

It is a file of Linux without a name (`memfd_create`): other processes open it by this process's number, nothing of it is left
when the last of them ends, however that happens, and the size of /dev/shm does not limit it. It keeps the weights between
updates, so that an engine that is started again gets them without the trainer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from mmap import PAGESIZE, mmap
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SharedWeights", "read_sheet"]

BUCKET_BYTES = 64 * 2**20

ALIGNMENT = 64
"""bytes between the beginnings of tensors, a multiple of"""


@dataclass
class _Bucket:
    """A separately mapped part of the memory."""

    offset: int
    memory: mmap
    used: int = 0

    def take(self, size: int) -> int | None:
        """Reserve bytes; return where they begin, or None where there is no room."""
        begin = -(-self.used // ALIGNMENT) * ALIGNMENT
        if begin + size > len(self.memory):
            return None
        self.used = begin + size
        return begin


@dataclass
class SharedWeights:
    """The weights that were written last.

    Args:
        dtype: what floating-point tensors are converted to while they are copied.
        bucket_bytes: size of a bucket; one that holds a larger tensor is as large as that.
    """

    dtype: torch.dtype
    bucket_bytes: int = BUCKET_BYTES
    sheets: list[list[Any]] = field(default_factory=list)
    """name, dtype, shape, offset of the bucket, offset in it, bytes of each tensor"""
    _buckets: list[_Bucket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = os.memfd_create("rlhf-weights", os.MFD_CLOEXEC)
        self._size = 0

    @property
    def path(self) -> str:
        """Return the path that other processes of this user open."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def buckets(self) -> list[list[int]]:
        """Offset and size of each bucket."""
        return [[each.offset, len(each.memory)] for each in self._buckets]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(sheet[-1] for sheet in self.sheets)

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy all tensors here; one copy each, converted on the way. Nobody may read meanwhile."""
        self.sheets = []
        waiting = iter(self._buckets)
        bucket = next(waiting, None)
        for each in self._buckets:
            each.used = 0
        for name, tensor in weights:
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            size = tensor.numel() * dtype.itemsize
            begin = bucket.take(size) if bucket is not None else None
            while begin is None:
                bucket = next(waiting, None) or self._add_bucket(size)
                begin = bucket.take(size)
            assert bucket is not None
            sheet = [name, str(dtype).removeprefix("torch."), list(tensor.shape), bucket.offset, begin, size]
            read_sheet({bucket.offset: bucket.memory}, sheet)[1].copy_(tensor.detach())
            self.sheets.append(sheet)

    def _add_bucket(self, size: int) -> _Bucket:
        """Return a new bucket with room for `size` bytes, at the end of the memory."""
        room = -(-max(size, self.bucket_bytes) // PAGESIZE) * PAGESIZE
        os.ftruncate(self._file, self._size + room)
        bucket = _Bucket(self._size, mmap(self._file, room, offset=self._size))
        self._buckets.append(bucket)
        self._size += room
        return bucket

    def close(self) -> None:
        """Free the memory, as far as no other process has it open; a second call does nothing."""
        self.sheets, self._buckets = [], []
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_sheet(buckets: Mapping[int, mmap], sheet: list[Any]) -> tuple[str, Tensor]:
    """Return a tensor by its name, without copying it.

    Args:
        buckets: mapped memory by its offset.
        sheet: see `SharedWeights.sheets`.
    """
    name, dtype, shape, bucket, begin, size = sheet
    if not size:
        return name, torch.empty(shape, dtype=getattr(torch, dtype))
    raw = torch.frombuffer(buckets[bucket], dtype=torch.uint8, count=size, offset=begin)
    return name, raw.view(getattr(torch, dtype)).view(shape)
