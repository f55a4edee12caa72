"""The ranks that share a batch or a model, and the few values they exchange.

One process is a world of size one, where every sum is the thing itself. Strategies that run under `torchrun` or
`deepspeed`, or inside a group of Ray actors, give a `TorchWorld`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DataWorld", "TorchWorld", "World", "data_world"]


class World:
    """One process."""

    rank: int = 0
    size: int = 1
    first: bool = True
    """False on a rank that works on the rows of another one, which writes for both (`DataWorld`)"""

    @property
    def leads(self) -> bool:
        """True on the one rank that writes files and logs."""
        return self.first and self.rank == 0

    def share(self, thing: Any) -> Any:
        """Return the `thing` of the first of the ranks that work on the same rows; here the only one."""
        return thing

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over ranks; every rank gets it. Collective: all ranks call it in the same order."""
        return tensor

    def total(self, value: float) -> float:
        """The sum of a number over ranks, in float64. Collective, like `sum`."""
        if self.size == 1:
            return value
        return float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def gather(self, thing: Any) -> list[Any]:
        """One picklable thing per rank, in rank order; every rank gets all."""
        return [thing]

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        """Send `parts[r]` to rank r, and return what each rank sent here, in rank order. Collective."""
        return [sent[self.rank] for sent in self.gather(list(parts))]

    def barrier(self) -> None:
        """Wait until every rank is here."""


class TorchWorld(World):
    """The ranks of a `torch.distributed` process group (the default one where `group` is None)."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank(group)
        self.size = torch.distributed.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def gather(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(things, thing, group=self.group)
        return things

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        sent = torch.tensor([len(part) for part in parts])
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=self.group)
        outgoing = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8)[: int(sent.sum())]
        incoming = torch.empty(int(received.sum()), dtype=torch.uint8)
        sizes = received.tolist()
        torch.distributed.all_to_all_single(incoming, outgoing, sizes, sent.tolist(), group=self.group)
        return [part.numpy().tobytes() for part in incoming.split(sizes)]

    def barrier(self) -> None:
        torch.distributed.barrier(group=self.group)


class DataWorld(TorchWorld):
    """The ranks as holders of rows, where `together` neighbors work on the same rows.

    `rank` and `size` count the holders. Sums and gathers are over one rank of each, and give every rank the same.
    """

    def __init__(self, together: int) -> None:
        ranks, mine = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if ranks % together:
            raise UsageError(
                f"{ranks} ranks cannot form groups of {together} that share rows; start a multiple of {together} ranks"
            )
        # a group takes torch's own limit if it is not given one
        everyone: Any = torch.distributed.group.WORLD
        limit = everyone._get_backend(torch.device("cpu")).options._timeout
        across = [torch.distributed.new_group(list(range(each, ranks, together)), limit) for each in range(together)]
        neighbors = [list(range(each, each + together)) for each in range(0, ranks, together)]
        super().__init__(across[mine % together])
        self.first = mine % together == 0
        self.leader = mine - mine % together
        self.neighbors = [torch.distributed.new_group(each, limit) for each in neighbors][mine // together]

    def share(self, thing: Any) -> Any:
        things = [thing]
        torch.distributed.broadcast_object_list(things, src=self.leader, group=self.neighbors)
        return things[0]

    def barrier(self) -> None:
        torch.distributed.barrier()


@cache
def data_world(together: int) -> DataWorld:
    """Return the ranks as holders of rows; its groups are made once in a process. Collective."""
    return DataWorld(together)
