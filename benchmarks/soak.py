"""A long run of a tiny GRPO: does memory stay flat, do files get closed, does the rotation bound the disk?

One process, checkpoints beside the training every 25 steps, an evaluation every 500. Every tenth step writes down resident
memory (after a garbage collection), open file handles, threads, and the bytes under OUTPUT/checkpoints; the slopes are least
squares over the second half, when caches are full. It ends with code 1 if memory grows by more than 5 MiB in 1,000 steps, or
handles or disk do not stay where they were. Ctrl-C ends it early, and what there is until then is judged.

    python benchmarks/soak.py --steps 2000
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from rlhf_core import Registry, Run, hookimpl, make_config
from rlhf_core.errors import RunStopped

MOST_GROWTH = 5.0
"""MiB per 1,000 steps: what an allocator's fragments come to; a kept batch of this run would be 20 times as much."""


def main() -> None:
    """Run, print one line of figures, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps: int = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        reward = Path(folder) / "reward.py"
        reward.write_text("def reward_func(completions):\n    return [len(set(text)) / 8 for text in completions]\n")
        registry, watch = Registry(), Watch(Path(folder) / "run" / "checkpoints")
        registry.register(watch, "watch")
        config = make_config(
            "grpo", registry, model="tiny:hidden=32,layers=2", data="prompts", reward={"use": "func", "path": str(reward)},
            steps=steps, batch_size=2,
            sampling={"n": 2, "max_new_tokens": 8}, actor={"optim": {"lr": 1e-3}}, output=str(watch.checkpoints.parent),
            save_every=25, save_async=True, keep=2, keep_best="reward/mean", eval_every=500, evaluator="heldout",
        )  # fmt: skip
        started = time.perf_counter()
        with suppress(RunStopped):  # by Ctrl-C: what there is until then is judged
            Run(config, registry).train()
        seconds = time.perf_counter() - started
    late = watch.rows[len(watch.rows) // 2 :]
    growth = numpy.polyfit([row[0] for row in late], [row[1] for row in late], 1)[0] * 1000
    handles, threads = ({row[k] for row in late} for k in (2, 3))
    disk = [row[4] for row in late]
    print(
        f"{late[-1][0]} steps in {seconds:.0f} s: resident memory {late[0][1]:.1f} to {late[-1][1]:.1f} MiB over the second "
        f"half, {growth:+.2f} MiB per 1,000 steps; {min(handles)} to {max(handles)} file handles, {min(threads)} to "
        f"{max(threads)} threads; checkpoints {min(disk):.2f} to {max(disk):.2f} MB"
    )
    bounded = max(handles) - min(handles) <= 3 and max(disk) <= 5 * max(min(disk), watch.one)  # two, the best, one more
    sys.exit(0 if growth <= MOST_GROWTH and bounded else 1)


@dataclass
class Watch:
    """An observer that measures this process."""

    checkpoints: Path
    rows: list[tuple[int, float, int, int, float]] = field(default_factory=list)
    """step, MiB, file handles, threads, MB on the disk"""
    one: float = 0.0
    """MB of the first checkpoint"""

    @hookimpl
    def rlhf_step_end(self, step: int) -> None:
        """Every tenth step, between two saves."""
        if step % 10:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        handles = sum(1 for _ in Path("/proc/self/fd").iterdir())
        disk = _megabytes(self.checkpoints)
        self.one = self.one or disk
        self.rows.append((step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, handles, threading.active_count(), disk))


def _megabytes(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # removed meanwhile, by the thread that saves
            continue
    return total / 1e6


if __name__ == "__main__":
    main()
