"""A long run of a tiny GRPO: do memory, handles, threads and processes stay flat, and does the rotation bound the disk?

One process with everything that lives as long as a run: the trackers TensorBoard and wandb (offline), an alarm whose band
the lengths leave again and again, checkpoints in the background every 25 steps, an evaluation every 50. Every tenth step
writes down resident memory (after a garbage collection), that of child processes (wandb's service), open file handles,
threads, child processes, files in the temporary folder, the bytes under OUTPUT/checkpoints, and those of all else under
OUTPUT, which grow by what each step logs. Slopes are least squares over the second half, when caches are full. It ends with
code 1 if memory grows by more than 5 MiB in 1,000 steps, if handles, threads, processes, temporary files or checkpoints do
not stay where they were, or if a step logs more in the last quarter than in the one before. Ctrl-C ends it early, and what
there is until then is judged.

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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from rlhf_core import Registry, Run, hookimpl, make_config
from rlhf_core.errors import RunStopped

MOST_GROWTH = 5.0
"""MiB per 1,000 steps: what an allocator's fragments come to; a kept batch of this run would be 20 times as much."""
MOST_CHILD_GROWTH = 20.0
"""MiB per 1,000 steps of the tracker's own service, written in Go, whose heap comes and goes."""


def main() -> None:
    """Run, print the figures, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps: int = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keep_within(folder)
        reward = folder / "reward.py"
        reward.write_text("def reward_func(completions):\n    return [len(set(text)) / 8 for text in completions]\n")
        registry, watch = Registry(), Watch(folder / "run", folder / "tmp")
        registry.register(watch, "watch")
        config = make_config(
            "grpo", registry, model="tiny:hidden=32,layers=2", data="prompts", reward={"use": "func", "path": str(reward)},
            steps=steps, batch_size=2, sampling={"n": 2, "max_new_tokens": 8}, actor={"optim": {"lr": 1e-3}},
            output=str(watch.output), save_every=25, save_async=True, keep=2, keep_best="reward/mean",
            evaluator="heldout", eval_every=50,
            observer={
                "use": "tensorboard,wandb,alarm", "wandb": {"mode": "offline"},
                "alarm": {"length": (7.5, 100.0), "patience": 1},
            },
        )  # fmt: skip
        started = time.perf_counter()
        with suppress(RunStopped):  # by Ctrl-C: what there is until then is judged
            Run(config, registry).train()
        seconds = time.perf_counter() - started
    sys.exit(judge(watch.rows, seconds))


def keep_within(folder: Path) -> None:
    """Let every file that a library writes be in the folder, where it is counted."""
    (folder / "tmp").mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
    os.environ |= {f"WANDB_{kind}_DIR": str(folder / "tmp" / "wandb") for kind in ("CACHE", "CONFIG")}


@dataclass(frozen=True)
class Row:
    """Measurements of one step."""

    step: int
    memory: float
    """MiB of this process"""
    children_memory: float
    """MiB of its child processes"""
    handles: int
    threads: int
    children: int
    temporary: int
    """files in the temporary folder"""
    checkpoints: float
    """MB"""
    logged: float
    """MB of all else under OUTPUT"""


def judge(rows: list[Row], seconds: float) -> int:
    """Print the figures; 0 if nothing grew that must not."""
    late = rows[len(rows) // 2 :]
    middle = late[len(late) // 2]
    growth, children_growth = slope(late, "memory"), slope(late, "children_memory")
    before = (middle.logged - late[0].logged) / max(middle.step - late[0].step, 1)
    after = (late[-1].logged - middle.logged) / max(late[-1].step - middle.step, 1)
    flat = {name: [getattr(row, name) for row in late] for name in ("handles", "threads", "children", "temporary")}
    disk = [row.checkpoints for row in late]
    print(
        f"{late[-1].step} steps in {seconds:.0f} s; over the second half:\n"
        f"resident memory {late[0].memory:.1f} to {late[-1].memory:.1f} MiB, {growth:+.2f} MiB per 1,000 steps; "
        f"of child processes {late[0].children_memory:.1f} to {late[-1].children_memory:.1f} MiB, {children_growth:+.2f}\n"
        f"file handles {span(flat['handles'])}; threads {span(flat['threads'])}; child processes "
        f"{span(flat['children'])}; temporary files {span(flat['temporary'])}\n"
        f"checkpoints {min(disk):.2f} to {max(disk):.2f} MB; everything else {1000 * before:.2f} kB per step, "
        f"then {1000 * after:.2f} kB per step"
    )
    one = min(row.checkpoints for row in rows if row.checkpoints)
    bounded = {
        "memory": growth <= MOST_GROWTH,
        "memory of child processes": children_growth <= MOST_CHILD_GROWTH,
        "file handles": max(flat["handles"]) - min(flat["handles"]) <= 3,  # the thread that saves has some open
        "threads": max(flat["threads"]) - min(flat["threads"]) <= 1,  # the same
        "child processes": len(set(flat["children"])) == 1,
        "temporary files": max(flat["temporary"]) - min(flat["temporary"]) <= 2,  # of a table that is being sent
        "checkpoints": max(disk) <= 4.2 * one,  # two, the best, and one that is being written; numbers get longer
        "what a step logs": after <= 1.1 * before,
    }
    grew = [name for name, good in bounded.items() if not good]
    print(f"grew: {', '.join(grew)}" if grew else "nothing grew")
    return int(bool(grew))


def slope(rows: list[Row], name: str) -> float:
    """Growth per 1,000 steps, by least squares."""
    return float(numpy.polyfit([row.step for row in rows], [getattr(row, name) for row in rows], 1)[0] * 1000)


def span(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}"


@dataclass
class Watch:
    """An observer that measures this process, its children and its files."""

    output: Path
    temporary: Path
    rows: list[Row] = field(default_factory=list)

    @hookimpl
    def rlhf_step_end(self, step: int) -> None:
        """Every tenth step, between two saves."""
        if step % 10:
            return
        gc.collect()
        children = list(children_of(os.getpid()))
        sizes = sizes_of(self.output)
        saved = sum(size for path, size in sizes.items() if self.output / "checkpoints" in path.parents)
        self.rows.append(
            Row(
                step,
                memory=resident(os.getpid()),
                children_memory=sum(map(resident, children)),
                handles=sum(1 for _ in Path("/proc/self/fd").iterdir()),
                threads=threading.active_count(),
                children=len(children),
                temporary=len(sizes_of(self.temporary)),
                checkpoints=saved / 1e6,
                logged=(sum(sizes.values()) - saved) / 1e6,
            )
        )


def resident(process: int) -> float:
    """MiB of a process; 0 if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def children_of(process: int) -> Iterator[int]:
    """Yield the children of a process, and theirs."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from children_of(child)


def sizes_of(folder: Path) -> dict[Path, int]:
    """Bytes of every file below a folder, some of which may be removed meanwhile."""
    sizes = {}
    for path in (Path(root) / name for root, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):
            sizes[path] = path.lstat().st_size
    return sizes


if __name__ == "__main__":
    main()
