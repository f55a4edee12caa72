"""Weights from rank 0 of a role to the rollout engines, bucket by bucket, past the controller.

The controller makes one call on each rank and one on each engine, however many bytes there are. A bucket goes into the object
store once and is given to every engine from there, while the next one is copied. An engine that does not take buckets is left
out, and reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_distributed_ray.arrays import buckets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["WEIGHTS", "ReceivedBuckets", "Shipment", "narrow", "send_weights"]

WEIGHTS = "weights"
"""Ray's concurrency group of what brings weights to an engine: they come while it samples (`--partial.midway`)."""

AT_ONCE = 4
"""Buckets on their way to an engine; the sender waits for the oldest before it copies another one."""


@dataclass
class Shipment:
    """Weights that were sent."""

    buckets: list[Any] = field(default_factory=list)
    """references of all buckets, in order"""
    late: list[int] = field(default_factory=list)
    """numbers of the engines that did not take them all"""


def narrow(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield weights with matrices in `dtype`, where that is smaller: what an engine rounds anyway need not travel.

    Vectors (norms, biases) are few bytes, and some models keep them in float32, so they stay as they are.
    """
    for name, tensor in weights:
        wide = tensor.is_floating_point() and tensor.dim() > 1 and tensor.element_size() > dtype.itemsize
        yield name, tensor.to(dtype) if wide else tensor


def send_weights(
    weights: Iterator[tuple[str, Tensor]],
    engines: Sequence[Any],
    role: str,
    sync: int,
    patience: float,
    group: str | None = None,
) -> Shipment:
    """Send `weights` of a role to these actors.

    Args:
        weights: the tensors by name.
        engines: actors with `receive(role, sync, number, bucket)`.
        role: name of the role.
        sync: number of this sync; an engine forgets the buckets of another one.
        patience: seconds that an engine may take for a bucket.
        group: concurrency group in which engines receive; None is that of their other calls.
    """
    import ray

    sent, live, under_way = Shipment(), list(range(len(engines))), list[dict[Any, int]]()
    for number, bucket in enumerate(buckets(weights)):
        sent.buckets.append(ray.put(bucket))
        under_way.append({
            engines[k].receive.options(concurrency_group=group).remote(role, sync, number, sent.buckets[-1]): k for k in live
        })  # fmt: skip
        if len(under_way) >= AT_ONCE:
            live = _await_oldest(under_way, live, patience)
    while under_way:
        live = _await_oldest(under_way, live, patience)
    sent.late = [k for k in range(len(engines)) if k not in live]
    return sent


def _await_oldest(under_way: list[dict[Any, int]], live: list[int], patience: float) -> list[int]:
    """Wait for the oldest bucket; return the engines of `live` that have taken it."""
    import ray

    asked = {reference: k for reference, k in under_way.pop(0).items() if k in live}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=patience) if asked else ([], [])
    taken = []
    for reference in done:
        try:
            ray.get(reference)
        except ray.exceptions.RayError:  # the controller finds out what became of the engine
            continue
        taken.append(asked[reference])
    return sorted(taken)


class ReceivedBuckets:
    """Counts the buckets of one sync; one that comes twice counts once."""

    def __init__(self) -> None:
        self._sync = -1
        self._published: int | None = None
        self._numbers: set[int] = set()
        self.bytes = 0

    def accept(self, sync: int, number: int, size: int) -> bool:
        """Return True if this bucket is new."""
        if sync != self._sync:
            self._sync, self._numbers, self.bytes = sync, set(), 0
        if number in self._numbers:
            return False
        self._numbers.add(number)
        self.bytes += size
        return True

    def publish(self) -> bool:
        """Return True the first time that the weights of this sync are published."""
        new, self._published = self._sync != self._published, self._sync
        return new

    def check(self, sync: int, count: int) -> None:
        """Check that all `count` buckets of a sync are here: what an engine lacks would be wrong in silence."""
        assert (self._sync, len(self._numbers)) == (sync, count), (
            f"{len(self._numbers)} of {count} buckets have arrived"
        )
