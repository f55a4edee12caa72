"""The machine's own rates: a large matrix product, and a large copy."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from gpu_checks.measure import seconds

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["limits"]

NAMES = ("torch", "triton", "transformers", "peft", "vllm", "deepspeed", "ray", "flash-attn", "kernels")


def limits(context: Context) -> None:
    """Report versions, and measure bfloat16 matrix products (FLOP/s) and device-to-device copies (bytes read and written)."""
    versions = [f"{name} {_version(name)}" for name in NAMES if _version(name)]
    context.note(f"Python {platform.python_version()}, {', '.join(versions)}; {os.cpu_count()} cores")
    if context.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        context.note(
            f"{device.name}, {total / 2**30:.1f} GiB ({free / 2**30:.1f} free), {device.multi_processor_count} "
            f"multiprocessors, compute capability {device.major}.{device.minor}, CUDA {torch.version.cuda}"
        )
    flops = matmul_rate(context)
    copied = copy_rate(context)
    context.row(limit="bfloat16 matrix product", figure=flops / 1e12, unit="TFLOP/s")
    context.row(limit="device copy, read and written", figure=copied / 1e9, unit="GB/s")
    context.send({"limits": {"flops": flops, "bytes": copied}})


def matmul_rate(context: Context) -> float:
    """Return FLOP/s of a square product on random data."""
    size = context.pick(8192, 256)
    a, b = (torch.randn(size, size, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    rounds = context.pick(20, 2)

    def products() -> None:
        for _ in range(rounds):
            torch.mm(a, b)

    return rounds * 2 * size**3 / seconds(products)


def copy_rate(context: Context) -> float:
    """Return bytes per second, counting those read and those written."""
    source = torch.randn(context.pick(2**30, 2**18), device=context.device)
    target = torch.empty_like(source)
    rounds = context.pick(10, 2)

    def copies() -> None:
        for _ in range(rounds):
            target.copy_(source)

    return rounds * 2 * source.numel() * source.element_size() / seconds(copies)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
