"""States of a body that is not trained, kept by row: where only heads are trained, each row goes through the body once.

A row is known by its tokens. Of a row whose score alone is wanted, one state is kept; else one for each completion token.
They are kept in main memory up to a limit, and those that were not used for longest are dropped first; in a folder, too, if the
user names one (`feature_store`). When a weight of the body changes after all (a checkpoint is loaded), everything in memory
is forgotten.

Left out on purpose: a body whose weights are sharded over ranks, which must all run it together.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from rlhf_core.models.inputs.arrange import Inputs
    from rlhf_core.models.inputs.feature_store import FeatureStore

__all__ = ["Features", "trains_only_heads"]

LIMIT = 2**30
"""Bytes of states kept: a quarter of a million scores of a model 1,024 wide in float32, or 260,000 tokens."""

Read = Callable[["Inputs"], tuple[Any, ...]]
"""States of all cells, which cells predict completion tokens, rows' last cells, and whatever else there is."""


class _RowStates(NamedTuple):
    states_TH: Tensor
    """states of its completion tokens; none where only scores are wanted"""
    last_H: Tensor


def trains_only_heads(model: nn.Module, body: nn.Module) -> bool:
    """Return True if something of `model` is trained, and nothing of its `body`."""
    return not any(p.requires_grad for p in body.parameters()) and any(p.requires_grad for p in model.parameters())


class Features:
    """The rows read so far.

    Args:
        limit: bytes of states that main memory holds.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.store: FeatureStore | None = None
        """store that keeps them for other runs, if there is one"""
        self.digest: Callable[[], bytes] = bytes
        """computes the identity of this body, for the store"""
        self._body = b""
        self.held = 0
        self._rows: OrderedDict[bytes, _RowStates] = OrderedDict()
        self._versions: list[int] = []

    def __call__(
        self, inputs: Inputs, tokens: bool, weights: Iterable[Tensor], read: Read
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first three things that `read` gives, cells without a use left out; only rows that are new are read.

        Args:
            inputs: the rows.
            tokens: whether states of completion tokens are wanted, not only the last ones.
            weights: what the states depend on.
            read: the body's forward pass.
        """
        versions = [weight._version for weight in weights]
        if versions != self._versions:
            self._rows.clear()
            self.held, self._versions = 0, versions
            self._body = self.digest() if self.store is not None else b""
        keys = _keys(inputs, tokens)
        new = [n for n, key in enumerate(keys) if key not in self._rows]
        found = {key: self._rows[key] for key in keys if key in self._rows}
        if new and self.store is not None:
            with torch.inference_mode(False):
                stored = self.store.get([self._body + keys[n] for n in new])
            found |= {key.removeprefix(self._body): _RowStates(*row) for key, row in stored.items()}
            new = [n for n in new if keys[n] not in found]
        if new:
            with torch.inference_mode(False), torch.no_grad():  # what inference keeps, training reads
                rows = _read(_pick(inputs, new), tokens, read)
            fresh = dict(zip((keys[n] for n in new), rows, strict=True))
            if self.store is not None:
                self.store.put({self._body + key: row for key, row in fresh.items()})
            found |= fresh
        for key in keys:
            self._keep(key, found[key])
        device = inputs.ids_NS.device
        states_MH = torch.cat([found[key].states_TH for key in keys])
        last_NH = torch.stack([found[key].last_H for key in keys])
        at = torch.arange(len(states_MH) + len(keys), device=device)
        return torch.cat([states_MH, last_NH]).to(device), at[: len(states_MH)], at[len(states_MH) :]

    def _keep(self, key: bytes, row: _RowStates) -> None:
        """Hold a row as the one used last."""
        if key in self._rows:
            self._rows.move_to_end(key)
            return
        self._rows[key] = row
        self.held += _size(row)
        while self.held > self.limit:
            self.held -= _size(self._rows.popitem(last=False)[1])


def _size(row: _RowStates) -> int:
    return sum(each.untyped_storage().nbytes() for each in row)


def _keys(inputs: Inputs, tokens: bool) -> list[bytes]:
    """Return a key per row: its tokens, and how many of them are the completion."""
    N, S = inputs.ids_NS.shape
    ends = (inputs.last_N - torch.arange(N, device=inputs.last_N.device) * S + 1).tolist()
    counts = _counts(inputs)
    rows = inputs.ids_NS.cpu().numpy()
    return [
        hashlib.blake2b(rows[n, : ends[n]].tobytes() + f"/{counts[n] if tokens else -1}".encode()).digest()
        for n in range(N)
    ]


def _counts(inputs: Inputs) -> list[int]:
    """Completion tokens of each row."""
    N, S = inputs.ids_NS.shape
    counts: list[int] = torch.bincount(inputs.states_M // S, minlength=N).tolist()
    return counts


def _pick(inputs: Inputs, rows: list[int]) -> Inputs:
    """The rows at these numbers, as far as a body reads them."""
    N, S = inputs.ids_NS.shape
    index = torch.tensor(rows, device=inputs.ids_NS.device)
    place_N = index.new_full((N,), -1).index_put((index,), torch.arange(len(rows), device=index.device))
    place_M = place_N[inputs.states_M // S]
    return replace(
        inputs,
        ids_NS=inputs.ids_NS[index],
        states_M=(place_M * S + inputs.states_M % S)[place_M >= 0],
        last_N=torch.arange(len(rows), device=index.device) * S + inputs.last_N[index] % S,
    )


def _read(inputs: Inputs, tokens: bool, read: Read) -> list[_RowStates]:
    """Each row's states, in separate storage."""
    states, states_M, last_N, *_ = read(inputs)
    counts = _counts(inputs) if tokens else [0] * len(inputs.ids_NS)
    wanted_MH = states.index_select(0, states_M if tokens else states_M[:0]).cpu()
    last_NH = states.index_select(0, last_N).cpu()
    return [_RowStates(part.clone(), last.clone()) for part, last in zip(wanted_MH.split(counts), last_NH, strict=True)]
