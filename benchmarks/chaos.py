"""Chaos under Ray: runs whose engines, workers and nodes die at moments that a seed draws, and a table of what became of them.

    python3 benchmarks/chaos.py --output chaos                     # 20 runs of 60 steps, 3 faults each
    python3 benchmarks/chaos.py --output chaos --runs 2            # the first two of them
    python3 benchmarks/chaos.py --output chaos --table             # the table alone, of what there is

Each run is a process of its own on a cluster of three logical nodes (`packages/distributed-ray/tests/ray_chaos.py`). It must
end without help, with the rows and numbers of a run that nobody disturbed and a recovery for each fault. The command continues
where it was stopped: runs that are in OUTPUT/runs.jsonl are not made again. A run that fails or takes too long is a row, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "packages" / "distributed-ray" / "tests" / "ray_chaos.py"
CLOSE = 1e-4
"""Largest difference of a computed number from the undisturbed run: sums in another order."""
TAIL = 300
"""Characters of a failure that are kept."""


def main() -> None:
    args = arguments()
    log = args.output / "runs.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    done = read(log)
    for seed in range(args.runs) if not args.table else ():
        if any(row["seed"] == seed and row["steps"] == args.steps for row in done):
            continue
        row = run(seed, args)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        done.append(row)
        print(f"seed {seed}: {verdict(row)}", file=sys.stderr, flush=True)
    text = table(sorted(done, key=lambda row: (row["steps"], row["seed"])))
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    if any(verdict(row) != "ended" for row in done):
        sys.exit(1)


def read(log: Path) -> list[dict[str, Any]]:
    """Rows of an earlier call; a line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def run(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run in a process group of its own, which ends with it."""
    folder = args.output / "runs" / f"{args.steps}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped in the middle of this run
    words = ["--seeds", str(seed), "--steps", str(args.steps), "--faults", str(args.faults)]
    words += ["--patience", str(args.patience), "--output", str(folder)]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet},
        start_new_session=True,
    )
    failure = ""
    try:
        out, said = process.communicate(timeout=args.deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, said = process.communicate()
        failure = f"did not end in {args.deadline:g} s"
    lines = [line for line in out.splitlines() if line.startswith('{"seed"')]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {"seed": seed}
    if not lines and not failure:
        failure = f"exit code {process.returncode}: {said[-TAIL:]}"
    return {**found, "steps": args.steps, "wall_seconds": time.monotonic() - began, "failure": failure}


def verdict(row: dict[str, Any]) -> str:
    """`ended` for a run that did what it must, else what it did not."""
    if row["failure"] and "injected" not in row:
        return str(row["failure"].splitlines()[-1])
    faults = row["injected"]
    missed = {
        "numbers differ": row["difference"] >= CLOSE,
        "rows differ": not row["same_uids"],
        "recoveries of roles differ from faults": row["roles"] != sum(fault["roles"] for fault in faults),
        "recoveries of engines differ from faults": row["engines"] != sum(fault["engines"] for fault in faults),
    }
    return ", ".join(name for name, wrong in missed.items() if wrong) or "ended"


def table(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown: a row per run, and a line of sums."""
    lines = [
        "| seed | steps | faults | recovered: roles, engines | seconds of recoveries | largest difference | outcome |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        if "injected" not in row:
            lines.append(f"| {row['seed']} | {row['steps']} | | | | | {verdict(row)} |")
            continue
        faults = "; ".join(described(fault) for fault in row["injected"])
        counts = f"{row['roles']:g}, {row['engines']:g}"
        lines.append(
            f"| {row['seed']} | {row['steps']} | {faults} | {counts} | {row['seconds']:.0f} | {row['difference']:.1e} "
            f"| {verdict(row)} |"
        )
    whole = [row for row in rows if "injected" in row]
    recoveries = sum(row["roles"] + row["engines"] for row in whole)
    seconds = sum(row["seconds"] for row in whole) / max(1, recoveries)
    ended = sum(verdict(row) == "ended" for row in rows)
    lines += [
        "",
        f"{ended} of {len(rows)} runs ended as they must; {recoveries:g} recoveries of {seconds:.0f} s each on average.",
    ]
    return "\n".join(lines) + "\n"


def described(fault: dict[str, Any]) -> str:
    """A fault in a few words."""
    how = fault.get("signal", "lost")
    return f"{fault['what']} {how} in step {fault['step'] + 1}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="number of runs; their seeds count from 0")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--faults", type=int, default=3, help="faults in each run")
    parser.add_argument(
        "--patience", type=float, default=20.0, help="seconds without a sign of life that count as a death"
    )
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds that a run may take")
    parser.add_argument("--table", action="store_true", help="write the table of the runs that there are")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs, runs.jsonl and table.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
