"""Timing, memory and profiles of calls on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch

__all__ = ["covered", "peak_gib", "profile", "release", "seconds", "synchronize", "timed"]


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call, with the device's work in it."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def seconds(call: Callable[[], object], rounds: int = 3, warm: int = 1) -> float:
    """Return the median seconds of a call, after some to warm up."""
    for _ in range(warm):
        call()
    return median(timed(call) for _ in range(rounds))


def release() -> None:
    """Give unused memory back to the device, and begin a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(call: Callable[[], object]) -> float:
    """Return the most GiB that tensors held during a call, beyond those before it; 0 on a CPU, which does not count them."""
    if not torch.cuda.is_available():
        call()
        return 0.0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**30


def profile(call: Callable[[], object], top: int = 12) -> dict[str, Any]:
    """Profile one call: its milliseconds without and with the profiler, those in which a kernel ran, and the longest kernels.

    The raw events are read, since the profiler's own tree of them takes ten seconds for a step of a large model.
    """
    usual = timed(call)
    on_gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as profiler:
        wall = timed(call)
    totals: dict[str, list[float]] = {}
    spans = []
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != wanted or (on_gpu and event.is_user_annotation()):
            continue
        totals.setdefault(event.name(), []).append(event.duration_ns() / 1e6)
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    ranked = sorted(totals.items(), key=lambda each: -sum(each[1]))[:top]
    return {
        "usual_ms": 1e3 * usual,
        "wall_ms": 1e3 * wall,
        "busy_ms": covered(spans) / 1e6,
        "launches": len(spans),
        "top": [{"kernel": name[:90], "ms": sum(ms), "calls": len(ms)} for name, ms in ranked],
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much of the time line spans cover; they may overlap."""
    total = reached = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
