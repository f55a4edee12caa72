"""Runs recipes with several seeds and prints their metrics by iteration, with standard errors over seeds.

    python benchmarks/recipes.py iterative-dpo online-ppo-one-pass deployment --seeds 0 1 2 --output runs/twins
    python benchmarks/recipes.py deployment --seeds 0 1 2 --set selector=best_worst --output runs/best-worst
    python benchmarks/recipes.py deployment --output runs/twins --report

NAME is `recipes/pipelines/NAME-smollm2.toml`. Runs are one after the other; the same command continues what was stopped. No
installation is needed: packages that are not installed are read from the source tree. Processor seconds are of this attempt.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from source_tree import ROOT, activate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipes, print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="values of the recipes' variables")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs, OUTPUT/NAME-SEED")
    parser.add_argument("--report", action="store_true", help="print the tables of what is finished, and run nothing")
    options = parser.parse_args(argv)
    if find_spec("rlhf_core") is None:
        activate()
    code = 0
    for name in options.names:
        for seed in [] if options.report else options.seeds:
            code = run(name, seed, options.set, options.output / f"{name}-{seed}") or code
        report(name, [options.output / f"{name}-{seed}" for seed in options.seeds])
    return code


def run(name: str, seed: int, values: Sequence[str], output: Path) -> int:
    """Run a recipe with a seed, or continue it; return its exit code."""
    file = ROOT / "recipes" / "pipelines" / f"{name}-smollm2.toml"
    words = ["recipe", str(file), "--seed", str(seed), "--output", str(output), *(["--set", *values] if values else [])]
    before, started = processor_seconds(), time.monotonic()
    done = subprocess.run([sys.executable, "-m", "rlhf_core", *words], cwd=ROOT, check=False)
    spent = f"{processor_seconds() - before:.0f} processor seconds, {time.monotonic() - started:.0f} seconds"
    print(f"{name}, seed {seed}: exit code {done.returncode}, {spent}", flush=True)
    return done.returncode


def processor_seconds() -> float:
    """Return the processor seconds of all processes that ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(name: str, folders: Sequence[Path]) -> None:
    """Print each table that the finished runs collected: means by iteration, and standard errors over seeds."""
    for step in sorted({path.parent.name for folder in folders for path in folder.glob("steps/*/results.csv")}):
        tables = [path for folder in folders if (path := folder / "steps" / step / "results.csv").exists()]
        rows = [read(path) for path in tables]
        print(f"\n{name}, {step.partition('-')[2]}, {len(rows)} seeds\n\n| | {' | '.join(rows[0][0])} |")
        print("|" + "---|" * (len(rows[0][0]) + 1))
        for number in range(min(map(len, rows))):
            cells = [summary([table[number][column] for table in rows]) for column in rows[0][0]]
            print(f"| {number} | {' | '.join(cells)} |")


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table without the columns that are no measurements."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "version" and not k.endswith("_se")} for row in csv.DictReader(file)
        ]


def summary(values: Sequence[str]) -> str:
    """Return mean and standard error over seeds; the value alone where there is one seed."""
    numbers = [float(value) for value in values if value]
    if len(numbers) < 2:
        return f"{numbers[0]:.3f}" if numbers else ""
    return f"{statistics.fmean(numbers):.3f} ± {statistics.stdev(numbers) / len(numbers) ** 0.5:.3f}"


if __name__ == "__main__":
    sys.exit(main())
