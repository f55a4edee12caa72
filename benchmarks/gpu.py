"""Everything about this system that a CPU cannot show, on one GPU, in eight minutes, from the source tree.

    python benchmarks/gpu.py --output DIR                  all checks that fit into 8 minutes
    python benchmarks/gpu.py --only training decoding      these alone
    python benchmarks/gpu.py --rehearse                    tiny sizes on the CPU: does the script itself work?
    python benchmarks/gpu.py --list-wheels                 what must be carried to a machine without a network

Nothing need be installed but torch, transformers and a few small packages. `gpu.json` and `gpu.md` in the output folder are
written anew after every event, so that a run that is cut keeps what it has; `gpu.log` has what the checks printed. A check
that fails is told with the end of its traceback, and the others go on. Exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import source_tree
from gpu_checks.check import CHECKS, find
from gpu_checks.driver import Driver
from gpu_checks.page import Report

REHEARSAL = "Rehearsal of the GPU checks on a CPU: no figure means anything"


def main(arguments: list[str] | None = None) -> int:
    """Run checks; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; what does not fit is not run")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these checks alone, in this order")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-report"), help="folder of gpu.json, gpu.md and gpu.log"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--list", action="store_true", help="print the checks")
    parser.add_argument(
        "--list-wheels", action="store_true", help="print which packages are missing here, and how to get them"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be above 0, not {options.minutes:g}")
    if options.list:
        print("\n".join(f"{check.name:18} {check.title}" for check in CHECKS))
        return 0
    if options.list_wheels:
        return list_wheels()
    if options.worker:
        from gpu_checks.worker import work

        work(options.rehearse)
        return 0
    checks = [find(name) for name in options.only] or list(CHECKS)
    if any(check in CHECKS for check in checks) and CHECKS[0] not in checks:
        checks.insert(0, CHECKS[0])  # others are measured against its rates
    report = Report(options.output, checks, REHEARSAL if options.rehearse else "GPU checks")
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as scratch, (options.output / "gpu.log").open("wb") as log:
        os.environ["TMPDIR"] = scratch  # of workers too, which may be killed
        source_tree.activate(Path(scratch) / "tree")
        Driver(Path(__file__).resolve(), report, options.rehearse, options.minutes, log).run(checks)
    for name, found in report.found.items():
        print(f"{name:18} {found['seconds']:6.1f} s  {found['status']}")
    print(f"see {options.output / 'gpu.md'}")
    return int(bool(report.failed()))


def list_wheels() -> int:
    """Print what is missing for which purpose, and the command that fetches it."""
    missing = source_tree.missing_wheels()
    for name, why in missing.items():
        print(f"{name}: {why}")
    names = list(missing) or sorted({name for name, _ in source_tree.CARRIED.values()})
    print("nothing is missing here; for another machine:" if not missing else "to fetch them:")
    print(f"  {source_tree.download_line([shlex.quote(name) for name in names])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
