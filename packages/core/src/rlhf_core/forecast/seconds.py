"""Expected seconds of each phase of a step, from operations, bytes and two rates.

With N numbers in the body's matrices, H in the head's, A the width of all queries, rows of L + T tokens, B of them:

    forward     B ((L + T)(2 N + 2 A (L + T)) + 2 H T)         causal attention reads half of the row on average
    backward    twice the forward pass; without the gradients of frozen matrices (adapters) as much as the forward pass
    recompute   one more forward pass of the body, with gradient checkpointing
    decoding    T steps, each the larger of 2 (N + H) operations per row and of reading weights and cache once
    update      weights and optimizer state are read and written, gradients read
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.forecast.options import GPUS
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.memory import RoleMemory, SamplingLoad
    from rlhf_core.forecast.options import PlanOptions
    from rlhf_core.forecast.passes import Passes

__all__ = ["Rates", "forward_operations", "rates_of", "sampling_seconds", "training_seconds", "update_seconds"]

MEASURED_SIZE = 2048
"""Rows and columns of the matrices that are multiplied to measure a rate."""


@dataclass(frozen=True)
class Rates:
    """Rates that a device reaches."""

    operations: float
    """per second, in matrix products"""
    bytes: float
    """per second, from memory"""
    origin: str
    """source of the rates, for readers of a forecast"""


def rates_of(options: PlanOptions, dtype: str) -> Rates | None:
    """Return stated or measured rates of products in `dtype`; None where they are unknown."""
    if options.measure:
        return _measure(dtype)
    gpu = GPUS.get(options.gpu)
    sheet = 0.0 if gpu is None else gpu.wide_tflops if dtype == "float32" else gpu.tflops
    matrix = options.tflops or sheet * options.efficiency
    memory = options.gb_s or (gpu.gb_s * min(0.8, 2 * options.efficiency) if gpu else 0.0)
    if not (matrix and memory):
        return None
    share = f"{options.efficiency:.0%} of the matrix rate of {options.gpu}"
    if options.tflops:
        origin = "stated" if options.gb_s else f"the first stated, the second of {options.gpu}"
    else:
        origin = f"{share}, the second stated" if options.gb_s else share
    return Rates(matrix * 1e12, memory * 1e9, origin)


def forward_operations(passes: Passes, rows: int, prompt: int, completion: int) -> float:
    """Return the operations of a forward pass over `rows` rows."""
    length = prompt + completion
    return rows * (length * (2 * passes.matrix + 2 * passes.attention * length) + 2 * passes.head * completion)


def training_seconds(passes: Passes, forward: float, rates: Rates, recomputes: bool) -> float:
    """Return the seconds of forward and backward passes whose forward part takes `forward` operations."""
    backward = 2.0 if 2 * passes.size.trained > passes.size.parameters else 1.0
    return forward * (1 + backward + float(recomputes)) / rates.operations


def update_seconds(memory: RoleMemory, rates: Rates) -> float:
    """Return the seconds of an update, which memory limits."""
    weights = memory.weights if memory.gradients else 0
    return (2 * min(weights, memory.gradients) + memory.gradients + 2 * memory.optimizer) / rates.bytes


def sampling_seconds(passes: Passes, load: SamplingLoad, rates: Rates) -> float:
    """Return the seconds of sampling a step's completions in one wave."""
    rows = load.prompts * load.completions
    prefill = forward_operations(passes, load.prompts, load.prompt_tokens, 0) / rates.operations
    length = load.prompt_tokens + load.new_tokens / 2
    read = (passes.size.parameters * passes.size.compute_bytes + rows * length * passes.size.cache_bytes) / rates.bytes
    work = 2 * (passes.matrix + passes.head) * rows / rates.operations
    return prefill + load.new_tokens * max(read, work)


def _measure(dtype: str) -> Rates:
    """Measure matrix products and copies on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind: torch.dtype = getattr(torch, dtype)
    left = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=kind, device=device)
    source = torch.ones(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _seconds_of(lambda: left @ left, device)
    copy = _seconds_of(lambda: target.copy_(source), device)
    return Rates(2 * MEASURED_SIZE**3 / product, 2 * source.numel() / copy, f"measured on this machine ({device.type})")


def _seconds_of(call: object, device: torch.device) -> float:
    """Return the shortest of three times that a call took, after one to warm up."""
    assert callable(call)
    found = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])
