"""Filling the row cache, and reading it, beside preparing the same rows without one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.json import Json
from rlhf_core.data.prepare import Preparer
from rlhf_core.models.loading.tokenizer import load_tokenizer
from scaling_curves.curve import Measured, Ratio, Series, curve

BLOCK = 16


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


@curve("row_cache", f"tokenized rows on the disk, in blocks of {BLOCK} rows")
def row_cache(quick: bool) -> Measured:
    """Passes without a cache and into one take turns block by block, so that other work on the machine meets both."""
    text = "What is the color of the sky over a town that nobody in the world has ever heard of? "
    encoder = Encoder(load_tokenizer("tiny", ModelOptions()))
    points: dict[str, list[tuple[float, float]]] = {"no cache": [], "into the cache": [], "out of the cache": []}
    walls = [0.0, 0.0]
    for size in (64, 128) if quick else (2_000, 8_000, 32_000):
        rows = [Example(f"{number} {text}", (f"{text}{number}",)) for number in range(size)]
        blocks = [rows[at : at + BLOCK] for at in range(0, size, BLOCK)]
        with tempfile.TemporaryDirectory() as folder:
            plain, filling, reading = (
                Preparer(encoder, online=False, data=Json("", cache=cache)) for cache in ("", folder, folder)
            )
            cpus, walls = [0.0, 0.0], [0.0, 0.0]
            for block in blocks:
                for which, preparer in enumerate((plain, filling)):
                    cpu, wall = timed(lambda p=preparer, b=block: p(b))
                    cpus[which] += cpu
                    walls[which] += wall
            cpu, wall = timed(filling.close)  # writes what waits
            cpus[1], walls[1] = cpus[1] + cpu, walls[1] + wall
            out, _ = timed(lambda p=reading, b=blocks: [p(block) for block in b])
            reading.close()
        for name, seconds in zip(points, (*cpus, out), strict=True):
            points[name].append((size, seconds))
    ratios = (
        []
        if quick
        else [
            Ratio("first pass / no cache, wall", walls[1] / walls[0], 1.2),
            Ratio("later pass / no cache, CPU", points["out of the cache"][-1][1] / points["no cache"][-1][1], 1.0),
        ]
    )
    return Measured([Series(name, "rows", "s", found) for name, found in points.items()], ratios)
