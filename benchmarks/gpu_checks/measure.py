"""Timing, memory and profiles of calls on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch

__all__ = ["gap_share", "peak_gib", "profile", "release", "seconds", "synchronize", "timed"]


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
    """Profile one call: wall milliseconds, the share in which no kernel ran, and the kernels that took most."""
    on_gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as profiler:
        wall = timed(call)
    totals: dict[str, list[float]] = {}
    spans = []
    for event in profiler.events() or ():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel != on_gpu or (is_kernel and event.is_user_annotation):
            continue
        took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        totals.setdefault(event.name, []).append(took)
        spans.append((event.time_range.start, event.time_range.end))
    ranked = sorted(totals.items(), key=lambda each: -sum(each[1]))[:top]
    return {
        "wall_ms": 1e3 * wall,
        "gap_share": gap_share(spans, 1e6 * wall),
        "launches": len(spans),
        "top": [{"kernel": name[:90], "ms": sum(us) / 1e3, "calls": len(us)} for name, us in ranked],
    }


def gap_share(spans: Iterable[tuple[float, float]], wall: float) -> float:
    """Return the share of `wall` that no span covers. Spans may overlap; all in one unit of time."""
    covered = reached = 0.0
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return max(0.0, 1 - covered / wall) if wall else 0.0
