"""Seconds that the loop is stopped by a checkpoint, against plainly writing the same bytes with safetensors.

The plain side is the least that keeps what was trained: `save_file` of weights and moments, and fsync. A checkpoint also holds
everything else a run goes on from, checksums of all of it, and gets its name only when it is on the disk. Beside the
training (`--save-async`) the loop is stopped for the copy into memory alone. The three take turns; medians are printed, of the
ratios too. A save beside the training is waited for before the next side's turn, outside the measured time.

    python benchmarks/checkpoint.py --hidden 1024 --layers 8 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf_core import Run, make_config
from rlhf_core.util.atomic_files import fsync_tree


def main() -> None:
    """Measure, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a real disk, not in memory")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Train one step, so that there are moments, then save what is there again and again."""
    model = f"tiny:hidden={options.hidden},layers={options.layers}"
    config = make_config(
        "grpo", model=model, reward="length", batch_size=2, steps=1, sampling={"n": 2, "max_new_tokens": 4},
        micro_tokens=256, output=str(folder / "run"), keep=1,
    )  # fmt: skip
    run = Run(config)
    with run.open():
        one_step(run)
        tensors = plain_tensors(run)
        gigabytes = sum(t.numel() * t.element_size() for t in tensors.values()) / 1e9
        sides: dict[str, Callable[[], float]] = {
            "plain": lambda: plain(tensors, folder / "plain"),
            "waiting": lambda: ours(run, beside=False),
            "beside": lambda: ours(run, beside=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for k in range(options.rounds + 1):
            for name in list(sides) if k % 2 else list(sides)[::-1]:
                took = sides[name]()
                run.checkpoints.background.wait()
                if k:  # the first round warms up: memory for the copy, the page cache
                    seconds[name].append(took)
    ratio = {n: median(a / b for a, b in zip(seconds[n], seconds["plain"], strict=True)) for n in ("waiting", "beside")}
    print(
        f"{gigabytes:.2f} GB: plain {median(seconds['plain']):.2f} s; the loop is stopped for "
        f"{median(seconds['waiting']):.2f} s (ratio {ratio['waiting']:.2f}), beside the training for "
        f"{median(seconds['beside']):.3f} s ({ratio['beside']:.3f}); median of {options.rounds}, load {os.getloadavg()[0]:.1f}"
    )


def one_step(run: Run) -> None:
    """A step of the loop, without its end."""
    from rlhf_core.loop import collect, credit, update

    iteration = next(run.iterations(collect))
    update(run, iteration, credit(run, iteration))
    run.state.step += 1


def plain_tensors(run: Run) -> dict[str, torch.Tensor]:
    """Weights and moments under names of their own, as a checkpoint of the run holds them."""
    from safetensors.torch import load_file

    run.save()
    roles: dict[str, Any] = {}
    for path in (run.output / "checkpoints").glob("step-*/roles/*/*.safetensors"):
        roles |= {f"{path.parent.name}.{path.stem}.{name}": tensor for name, tensor in load_file(path).items()}
    return roles


def plain(tensors: dict[str, torch.Tensor], folder: Path) -> float:
    """Write and force to the disk; the old file is removed before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started = time.perf_counter()
    save_file(tensors, folder / "all.safetensors")
    fsync_tree(folder)
    return time.perf_counter() - started


def ours(run: Run, beside: bool) -> float:
    """Save; the seconds until the loop could go on. Checkpoints before it are removed outside of that time."""
    object.__setattr__(run.config, "save_async", beside)
    run.state.step += 1
    for old in (run.output / "checkpoints").glob("step-*"):
        shutil.rmtree(old)
    started = time.perf_counter()
    run.save()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
