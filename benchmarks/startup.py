"""Start-up time of `rlhf-run` commands; each must take less than a second and not import torch.

    python benchmarks/startup.py [--repeat 5]

Each command runs in a process of its own, as a user's does; the median is what counts, the least shows what the machine
could do. `python -c pass` is the floor. Exits with 1 if a median is over the budget or torch was imported.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

BUDGET = 1.0
"""seconds"""

COMMANDS = [
    "--help",
    "plugins",
    "plugins --json",
    "grpo --help",
    "gropo",
    "grpo --reward lenght",
    "grpo --reward length --reward.targt 5",
    "grpo --steps many",
]

RUN = "import sys; from rlhf_core.cli import main; code = main({words!r}); sys.exit(7 if 'torch' in sys.modules else code)"


def measure(code: str, repeat: int) -> tuple[list[float], int]:
    """Seconds of each run, and the exit code."""
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        seconds.append(time.perf_counter() - began)
    return seconds, done.returncode


def main() -> int:
    """Print the table; 1 if something is too slow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print(f"{'command':55} {'median':>8} {'least':>8}  torch")
    failed = False
    floor, _ = measure("pass", repeat)
    print(f"{'python -c pass':55} {statistics.median(floor):7.3f}s {min(floor):7.3f}s")
    for command in COMMANDS:
        seconds, code = measure(RUN.format(words=command.split()), repeat)
        median = statistics.median(seconds)
        print(f"rlhf-run {command:46} {median:7.3f}s {min(seconds):7.3f}s  {'imported' if code == 7 else 'no'}")
        failed |= median > BUDGET or code not in (0, 2)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
