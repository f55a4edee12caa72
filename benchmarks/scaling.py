"""Growth of cost with size, one curve at a time: `python benchmarks/scaling.py [--only NAME …] [--quick] [--list]`.

Each module of `benchmarks/scaling_curves/` holds curves: a place of the system measured at three to five sizes. Printed are the
points, the exponent and the constant of the power law through them, and ratios within the same run beside their limits. Times
are CPU seconds unless a title says wall. The exit code is 1 if a ratio misses its limit; `--quick` takes tiny sizes, checks
that everything runs, and judges no figure.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time

import scaling_curves
from scaling_curves.curve import CURVES, Measured


def load() -> None:
    """Import every module of the folder, which registers its curves."""
    for module in sorted(pkgutil.iter_modules(scaling_curves.__path__), key=lambda each: each.name):
        importlib.import_module(f"scaling_curves.{module.name}")


def show(measured: Measured, judge: bool) -> bool:
    """Print what a curve measured; return False if a ratio misses its limit and is judged."""
    for series in measured.series:
        points = ", ".join(f"{size:,.0f}: {cost:.4g}" for size, cost in series.points)
        print(f"  {series.title} [{series.unit} by {series.size}]  {points}")
        steps = ", ".join(f"{each:.2f}" for each in series.exponents)
        print(f"    exponent {steps}; constant {series.constant:.3g} {series.unit} per {series.size} at the last point")
    kept = True
    for ratio in measured.ratios:
        verdict = "" if not judge else "  ok" if ratio.kept else "  MISSED"
        kept &= ratio.kept
        bound = "at least" if ratio.at_least else "at most"
        print(f"  {ratio.title}: {ratio.value:.3g} (limit: {bound} {ratio.limit:g}){verdict}")
    return kept or not judge


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen curves; return the exit code."""
    load()
    parser = argparse.ArgumentParser(description="Measure how cost grows with size.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(CURVES), help="curves to measure")
    parser.add_argument("--quick", action="store_true", help="take tiny sizes and judge no figure")
    parser.add_argument("--list", action="store_true", help="print the names of all curves")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:<18}{CURVES[name].about}" for name in sorted(CURVES)))
        return 0
    missed = []
    for name in options.only or sorted(CURVES):
        print(f"{name}: {CURVES[name].about}", flush=True)
        started = time.perf_counter()
        if not show(CURVES[name].measure(options.quick), judge=not options.quick):
            missed.append(name)
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
    if missed:
        print(f"over their limits: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
