"""One-pass estimators of a linear reward against the refitted maximum-likelihood estimate, on a synthetic stream of pairs.

phi is uniform on the unit sphere of D dimensions, z the difference of two, |theta*| = 2 and labels follow Bradley-Terry.
`omd` and, from D = 1024, `omd_cg` see each pair once; `mle` keeps all pairs and is fitted to 1e-10 at T/16, T/8, … T. All have
ridge 1. Printed per D: the error |theta - theta*| at the end and its ratio to that of `mle`, microseconds per update in the
first and the last quarter, seconds of one fit at T/16 and at T, and bytes of state at both times. Times are the processor's,
of one thread, so that a busy machine changes them little; all arms run in one process on the same pairs.

`--deploy` measures the deployment setting instead: cumulative regret after T/8, T/4, T/2 and T of 2,000 rounds with 16
answers on the unit sphere of 8 dimensions, |theta*| = 3, mean and 95 % interval over 5 seeds.

    python benchmarks/one_pass_rm.py --quick
    python benchmarks/one_pass_rm.py --deploy
    python benchmarks/one_pass_rm.py --json results.json --svg docs/one-pass-synthetic.svg

`--quick` takes D = 16 and 64 and short streams. An exact update costs O(D^2): streams of D = 1024 and 4096 are shorter
(`SIZES`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from rlhf_algos.one_pass import Mle, Omd, OmdCg
from rlhf_algos.selection.deployment import Deployment, SimulatedUser, round_regret
from rlhf_core import make_from_spec

SIZES = {16: 30_000, 64: 30_000, 256: 30_000, 1024: 4_000, 4096: 800}
"""Pairs of the stream by D."""
QUICK = {16: 2_000, 64: 2_000}
LARGE = 1024
"""D from which `omd_cg` runs as well: below, the dense state is small and faster."""
BLOCK = 100
"""Pairs that are made, and timed, together at most; each is one update."""


@dataclass
class Curve:
    """An estimator along the stream."""

    pairs: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """per update, median over the blocks since the last point; of `mle`, of one fit"""
    state_bytes: list[int] = field(default_factory=list)


def main() -> None:
    """Run every size, print the table, write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="*", help="D, of those with a length in SIZES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the curves to this file")
    parser.add_argument("--svg", type=Path, help="draw the curves into this file; needs matplotlib")
    parser.add_argument("--deploy", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.deploy:
        print_regrets(200 if options.quick else 2000)
        return
    sizes = QUICK if options.quick else {d: SIZES[d] for d in options.sizes or SIZES}
    print(HEADER)
    curves: dict[int, dict[str, Curve]] = {}
    for d, pairs in sizes.items():
        curves[d] = run_stream(d, pairs, options.seed)
        for name in curves[d]:
            print(table_row(d, name, curves[d]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({d: {n: asdict(c) for n, c in by.items()} for d, by in curves.items()}))
    if options.svg:
        draw(curves, options.svg)


def make_stream(d: int, pairs: int, seed: int, block: int) -> tuple[Tensor, Iterator[Tensor]]:
    """Return theta* (D,), and blocks of z (B, D), chosen minus rejected."""
    noise = torch.Generator().manual_seed(seed)
    theta_D = torch.randn(d, dtype=torch.float64, generator=noise)
    theta_D *= 2 / theta_D.norm()

    def blocks() -> Iterator[Tensor]:
        for start in range(0, pairs, block):
            size = min(block, pairs - start)
            phi_2BD = torch.randn(2, size, d, dtype=torch.float64, generator=noise)
            phi_2BD /= phi_2BD.norm(dim=2, keepdim=True)
            z_BD = phi_2BD[0] - phi_2BD[1]
            first_B = torch.rand(size, dtype=torch.float64, generator=noise) < torch.sigmoid(z_BD @ theta_D)
            yield torch.where(first_B[:, None], z_BD, -z_BD)

    return theta_D, blocks()


def run_stream(d: int, pairs: int, seed: int) -> dict[str, Curve]:
    """Return the curves of all estimators on one stream."""
    theta_D, blocks = make_stream(d, pairs, seed, min(BLOCK, pairs // 16))
    estimators: dict[str, Any] = {"omd": Omd(d), "mle": Mle(d, every=2**31, solver=solver(d))}
    if d >= LARGE:
        estimators["omd_cg"] = OmdCg(d)
    curves = {name: Curve() for name in estimators}
    spent: dict[str, list[float]] = {name: [] for name in estimators}
    points = [pairs * share // 16 for share in (1, 2, 4, 8, 12, 16)]
    seen = 0
    for z_BD in blocks:
        seen += len(z_BD)
        for name, estimator in estimators.items():
            started = time.process_time()
            for z_D in z_BD if name != "mle" else z_BD[None]:
                estimator.step(z_D[None] if name != "mle" else z_D)
            spent[name].append((time.process_time() - started) / len(z_BD))
        while points and seen >= points[0]:
            points.pop(0)
            for name, estimator in estimators.items():
                note(curves[name], name, estimator, seen, theta_D, spent[name])
                spent[name].clear()
    return curves


def solver(d: int) -> Any:
    """The solver of the refit: systems of D unknowns are too slow for large D."""
    return "newton" if d <= 1024 else "lbfgs"


def note(curve: Curve, name: str, estimator: Any, seen: int, theta_D: Tensor, spent: list[float]) -> None:
    """Add a point to the curve; `mle` is fitted for it."""
    seconds = median(spent) if spent else float("nan")
    if name == "mle":
        started = time.process_time()
        estimator.theta_D = torch.zeros_like(theta_D)  # a fit from zero: the same work at every size
        estimator.fit()
        seconds = time.process_time() - started
    curve.pairs.append(seen)
    curve.errors.append(float((estimator.theta_D - theta_D).norm()))
    curve.seconds.append(seconds)
    curve.state_bytes.append(sum(part.nbytes for part in estimator.state_dict().values() if isinstance(part, Tensor)))


HEADER = (
    f"{'D':>5} {'T':>6} {'arm':7} {'error':>7} {'/ mle':>6}  {'first quarter':>14} {'last quarter':>14} {'ratio':>6}"
    f"  {'bytes at T/16':>14} {'at T':>12}"
)


def table_row(d: int, name: str, curves: dict[str, Curve]) -> str:
    """The line of an estimator."""
    curve = curves[name]
    early, late = (
        (curve.seconds[0], curve.seconds[-1]) if name == "mle" else (median(curve.seconds[:3]), curve.seconds[-1])
    )
    unit, scale = ("s", 1.0) if name == "mle" else ("us", 1e6)
    return (
        f"{d:>5} {curve.pairs[-1]:>6} {name:7} {curve.errors[-1]:>7.3f} {curve.errors[-1] / curves['mle'].errors[-1]:>6.3f}"
        f"  {early * scale:>11.4g} {unit:2} {late * scale:>11.4g} {unit:2} {late / early:>6.2f}"
        f"  {curve.state_bytes[0]:>14,} {curve.state_bytes[-1]:>12,}"
    )


SELECTORS = (
    "optimistic",
    "best_second",
    "best_quartile",
    "best_worst",
    "random_pair",
    "max_uncertainty",
    "drts",
    "delta_ucb",
)


def print_regrets(rounds: int, seeds: int = 5) -> None:
    """Print cumulative regret by what is shown."""
    points = [rounds // share for share in (8, 4, 2, 1)]
    print(f"{'regret after':16}" + "".join(f"{point:>14}" for point in points) + f"{'T / (T/4)':>12}")
    for name in SELECTORS:
        runs = [regrets(name, rounds, seed) for seed in range(seeds)]
        cells = []
        for point in points:
            values = [run[point - 1] for run in runs]
            cells.append(f"{fmean(values):.0f} ± {2.776 * stdev(values) / seeds**0.5:.0f}")  # Student's t, 4 degrees
        ratio = fmean(run[-1] for run in runs) / fmean(run[points[1] - 1] for run in runs)
        print(f"{name:16}" + "".join(f"{cell:>14}" for cell in cells) + f"{ratio:>12.2f}", flush=True)


def regrets(name: str, rounds: int, seed: int, d: int = 8, answers: int = 16) -> list[float]:
    """Cumulative regret after each round."""
    noise = torch.Generator().manual_seed(seed)
    theta_D = torch.randn(d, dtype=torch.float64, generator=noise)
    theta_D *= 3 / theta_D.norm()
    user, deployment = SimulatedUser(noise), Deployment(Omd(d), make_from_spec("advantage", name, "selector"))
    total, history = 0.0, []
    for t in range(rounds):
        features_GD = torch.randn(answers, d, dtype=torch.float64, generator=noise)
        features_GD /= features_GD.norm(dim=1, keepdim=True)
        utility_G = features_GD @ theta_D
        first, second = deployment.choose(features_GD, t)
        total += round_regret(utility_G, first, second)
        history.append(total)
        deployment.hear(features_GD, first, second, user.prefers_first(utility_G, first, second))
    return history


def draw(curves: dict[int, dict[str, Curve]], path: Path) -> None:
    """Draw errors and times over pairs."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "one-pass"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    styles = {"omd": "-", "omd_cg": ":", "mle": "--"}
    for color, (d, by_name) in zip(("C0", "C1", "C2", "C3", "C4"), curves.items()):
        for name, curve in by_name.items():
            left.plot(curve.pairs, curve.errors, styles[name], color=color, label=f"D = {d}, {name}")
            right.plot(curve.pairs, curve.seconds, styles[name], color=color)
    left.set(xscale="log", yscale="log", xlabel="pairs", ylabel="error |theta - theta*|")
    right.set(xscale="log", yscale="log", xlabel="pairs", ylabel="seconds: an update (omd), one fit (mle)")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
