"""CUDA graphs without a GPU: what runs inside `torch.cuda.graph` is recorded, and replayed operation by operation.

As on a GPU, recording leaves every tensor as it was, a replay runs no Python of the model, reads and writes the very memory
of the recording, and tensors made inside hold nothing before the first replay. Reuse of memory and streams are not emulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["EmulatedGraph", "emulate_graphs"]


class EmulatedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    recorded = 0
    """graphs recorded since `emulate_graphs`"""
    replays = 0
    """replays of all of them"""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        EmulatedGraph.replays += 1
        for call, args, options, places in self.calls:
            fresh = [each for each in tree_leaves(call(*args, **options)) if isinstance(each, torch.Tensor)]
            given = {_storage(each) for each in tree_leaves((args, options)) if isinstance(each, torch.Tensor)}
            for place, new in zip(places, fresh, strict=True):
                if _storage(place) not in given:  # neither a view nor an operation in place
                    place.copy_(new)


class _Recorder(TorchDispatchMode):
    """Remembers operations, what they made, and what everything else was before them."""

    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self.graph, self.made = graph, set[int]()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        given = [each for each in tree_leaves((args, options)) if isinstance(each, torch.Tensor)]
        if call._schema.is_mutable:
            for each in given:
                if _storage(each) not in self.made | self.before.keys():
                    self.before[_storage(each)] = each.untyped_storage(), each.untyped_storage().clone()
        result = call(*args, **options)
        places = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.made |= {_storage(each) for each in places} - {_storage(each) for each in given}
        self.graph.calls.append((call, tree_map(_place, args), tree_map(_place, options), places))
        return result

    def forget(self) -> None:
        """Leave the tensors from outside as they were, and in those from inside what is no number and no index."""
        for storage, old in self.before.values():
            storage.copy_(old)
        for place in {_storage(each): each for *_, places in self.graph.calls for each in places}.values():
            if _storage(place) in self.made:
                place.untyped_storage().fill_(255)


def _place(value: Any) -> Any:
    """Return a tensor for the memory that a tensor has now: a parameter may move, a graph does not follow."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        """Operations run one after another here."""


@contextmanager
def _graph(graph: EmulatedGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "") -> Iterator[None]:
    assert capture_error_mode == "thread_local", "other threads may use the device meanwhile"
    recorder = _Recorder(graph)
    with recorder:
        yield
    recorder.forget()
    EmulatedGraph.recorded += 1


def emulate_graphs(monkeypatch: pytest.MonkeyPatch, memory: int = 2**40) -> type[EmulatedGraph]:
    """Let `torch.cuda` record and replay on the CPU, on a device of so many bytes; return the class that counts."""
    EmulatedGraph.recorded = EmulatedGraph.replays = 0
    for name, stand_in in (
        ("CUDAGraph", EmulatedGraph),
        ("graph", _graph),
        ("stream", lambda _: nullcontext()),
        ("current_stream", lambda *_: _Stream()),
        ("mem_get_info", lambda *_: (memory, memory)),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("rlhf_core.rollout.step._recording_stream", lambda _: _Stream())
    return EmulatedGraph
