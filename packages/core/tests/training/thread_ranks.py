"""Ranks that are threads of this process, for tests of what ranks tell each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rlhf_core.contract.distributed import TorchWorld, World

SECONDS = 120.0

Result = TypeVar("Result")


class ThreadWorld(World):
    """A rank that is a thread; it counts its collectives."""

    def __init__(self, rank: int, board: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.meeting = rank, len(board), board, meeting
        self.calls = 0

    def gather(self, thing: Any) -> list[Any]:
        self.calls += 1
        self.board[self.rank] = thing
        self.meeting.wait(SECONDS)
        everything = list(self.board)
        self.meeting.wait(SECONDS)
        return everything

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(tensor.detach().clone())).sum(0)


def together(rank: Callable[[ThreadWorld], Result], size: int) -> list[Result]:
    """Return what `rank` returns for each of `size` ranks."""
    board: list[Any] = [None] * size
    meeting = threading.Barrier(size)
    found: dict[int, Result] = {}

    def run(number: int) -> None:
        try:
            found[number] = rank(ThreadWorld(number, board, meeting))
        finally:
            if number not in found:
                meeting.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(size)]


def exchange() -> int:
    """In a process of several: send texts of unlike lengths, some of them empty, and check what comes."""
    torch.distributed.init_process_group("gloo")
    world = TorchWorld()
    parts = [f"{world.rank} to {target}".encode() * (target * world.rank) for target in range(world.size)]
    expected = [f"{source} to {world.rank}".encode() * (source * world.rank) for source in range(world.size)]
    received = world.exchange(parts)
    nothing = world.exchange([b""] * world.size)
    torch.distributed.destroy_process_group()
    return int(received != expected or nothing != [b""] * world.size)
