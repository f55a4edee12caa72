"""Ring attention on ranks, beside attention of one process in float64; run by `test_ring_attention` on every rank."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed

from rlhf_strategy_deepspeed.ring import RingAttention, zigzag

HEADS, KEY_HEADS, DIM, TOKENS = 6, 2, 8, 48
ROWS = {"one": [0, 48], "several": [0, 7, 8, 30, 48], "even": [0, 12, 24, 36, 48]}
"""Bounds of packed rows, of which a rank of four holds two pieces of 6 tokens each."""


def attention(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scale: float) -> Tensor:
    """Return causal attention inside each row, (heads, T, D), by torch's own function on repeated keys."""
    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            *(each[None, :, first:last] for each in (query, key, value)), is_causal=True, scale=scale, enable_gqa=True
        )[0]
        for first, last in pairwise(bounds)
    ]
    return torch.cat(rows, 1)


def drawn(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value of all tokens, which need gradients, and a gradient of the output; the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(HEADS, TOKENS, DIM), (KEY_HEADS, TOKENS, DIM), (KEY_HEADS, TOKENS, DIM), (HEADS, TOKENS, DIM)]
    query, key, value, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [each.to(dtype).requires_grad_() for each in (query, key, value)], gradient.to(dtype)


def held(rank: int, size: int) -> Tensor:
    """Return the numbers of the tokens of a rank."""
    width = TOKENS // (2 * size)
    return torch.cat([torch.arange(width) + width * piece for piece in zigzag(rank, size)])


def compare(folder: Path) -> None:
    """Leave FOLDER/RANK.pt: by rows and dtype, the largest errors of the output and of three gradients, and bytes sent."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = distributed.get_rank(), distributed.get_world_size()
    ring, mine = RingAttention(distributed.group.WORLD), held(rank, size)
    found = {}
    for name, bounds in ROWS.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            whole, gradient = drawn(torch.float64)
            expected = attention(*whole, bounds, 0.3)
            expected.backward(gradient)
            parts, gradient = drawn(dtype)
            own = [each.detach()[None, :, mine].requires_grad_() for each in parts]
            sent = _Sent()
            with patch.object(distributed, "batch_isend_irecv", sent):
                output = ring(
                    SimpleNamespace(is_causal=True), *own, torch.tensor(bounds, dtype=torch.int32), scaling=0.3
                )
                forward = sent.bytes
                output.backward(gradient[:, mine].transpose(0, 1)[None])
            pairs = [(output[0].transpose(0, 1), expected[:, mine])]
            pairs += [(one.grad[0], all_.grad[:, mine]) for one, all_ in zip(own, whole, strict=True)]
            errors = [float((one.double() - other).abs().max()) for one, other in pairs]
            found[name, str(dtype)] = errors, (forward, sent.bytes - forward), output.dtype == dtype
    torch.save(found, folder / f"{rank}.pt")


def wait_for_nobody(folder: Path) -> None:
    """Start a hop on the first rank alone, and leave the message of its end in FOLDER."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = distributed.new_group([0, 1], timeout=timedelta(seconds=1))
    if distributed.get_rank() == 0:
        try:
            RingAttention(group).send_on(torch.zeros(4)).end()
        except RuntimeError as error:
            (folder / "message").write_text(str(error), encoding="utf-8")
    distributed.barrier()


class _Sent:
    """Torch's function, which counts what this rank sends."""

    def __init__(self) -> None:
        self.bytes = 0
        self._send = distributed.batch_isend_irecv

    def __call__(self, operations: list[Any]) -> Any:
        self.bytes += sum(each.tensor.nbytes for each in operations if each.op is distributed.isend)
        return self._send(operations)
