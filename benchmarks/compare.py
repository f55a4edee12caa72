"""PPO, GRPO, RLOO and REINFORCE++ on the same prompts, samples and reward: a table and a plot of how the reward rises.

Every run is an ordinary one with the preset's own defaults; what they share is the model, the reward, the number of samples and
the actor's learning rate. Each is made with three seeds. Its held-out reward, KL and length are measured before its first step
and after its last one. After every run the table, the plot and OUTPUT/state.jsonl are written again. A comparison that is
started again leaves finished runs alone.

    python benchmarks/compare.py --output comparison                       # one run at a time, hours on a CPU
    python benchmarks/compare.py --output $OUT --model /tmp/model/smollm2-135m --jobs 8 --minutes 4      # on one GPU
    python benchmarks/compare.py --rehearse --output rehearsal             # the model tiny, to try the script
    python benchmarks/compare.py --page docs/reports/comparison.md --output comparison --minutes 0     # the table into the page
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import source_tree
from timed_runs import SHARED_ROLLOUT, Planned, TimedRuns, quiet_environment

Record = dict[str, Any]

METHODS = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++"}
COMPLETIONS = 32
"""Completions per step: 8 prompts, 4 completions each."""
HELDOUT = {
    "reward": "eval/heldout/reward",
    "kl": "eval/policy/kl",
    "tokens": "eval/policy/length",
}
STEPS = {"reward": "reward/mean", "kl": "kl/completion", "seconds": "time/step"}
WHEELS = ["tomli-w", "gguf==0.19.0", "vaderSentiment==3.3.2"]
HEADER = (
    "method", "seeds", "reward, first 3 steps", "last 3 steps", "their KL", "held-out reward", "its KL", "its tokens",
    "seconds per step",
)  # fmt: skip
BEGIN, END = "<!-- written by benchmarks/compare.py -->", "<!-- end of the table -->"


def main() -> int:
    """Make what is missing, and the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="table, plot, numbers and state")
    parser.add_argument("--earlier", type=Path, help="state.jsonl of another machine")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="everything ends within this time")
    parser.add_argument("--keep", type=Path, help="folder of the runs, kept, where runs that were cut are continued")
    parser.add_argument("--page", type=Path, help="put the table into this page, between its marks")
    parser.add_argument("--rehearse", action="store_true", help="the model tiny, one seed, two steps")
    parser.add_argument("--list-wheels", action="store_true", help="print the command that fetches what to carry")
    options = parser.parse_args()
    if options.list_wheels:
        print(source_tree.download_line(WHEELS))
        return 0
    if options.rehearse:
        options.model, options.seeds, options.steps = "tiny", 1, 2
    source_tree.activate()
    quiet_environment()

    def write(records: list[Record], facts: Record) -> None:
        write_files(records, facts, options.output, options.page)

    runs = TimedRuns(
        options.output, plan(options), options.jobs, options.minutes, read, write, options.keep, options.earlier
    )
    well = runs.run()
    print((options.output / "table.md").read_text(encoding="utf-8"))
    return int(not well)


def plan(options: argparse.Namespace) -> list[Planned]:
    """Return the runs, all methods of a seed before the next seed."""
    shared = {
        "model": options.model,
        "steps": options.steps,
        "batch_size": 8,
        "sampling": {"n": 4, "max_new_tokens": 32},
        "actor": {"optim": {"lr": 2e-5}},
        "reward": "length" if options.rehearse else "sentiment",
        "evaluator": {"use": "heldout,policy_stats", "heldout": {"n": 4}, "policy_stats": {"n": 2}},
        "rollout": SHARED_ROLLOUT,
        "save_every": 2 if options.keep else 0,
        "keep": 1,
    }
    seeds = range(options.seeds)
    return [
        Planned(f"{method}-seed{seed}", method, seed, {**shared, "algorithm": method, "seed": seed})
        for seed in seeds
        for method in METHODS
    ]


def read(member: Any) -> Record:
    """Return what is recorded of a run: its curves, and held-out figures before and after."""
    steps = list(member.metrics())
    evaluations = [
        {name: row[metric] for name, metric in HELDOUT.items() if metric in row}
        for row in member.metrics("evaluation-metrics.jsonl")
    ]
    whole = [each for each in evaluations if len(each) == len(HELDOUT)]
    return {
        "steps": {name: [row[metric] for row in steps if metric in row] for name, metric in STEPS.items()},
        "start": whole[0] if whole else {},
        "heldout": whole[-1] if len(whole) > 1 else {},
    }


def write_files(records: list[Record], facts: Record, output: Path, page: Path | None) -> None:
    """Write table, numbers and plot, and the table into a page."""
    from rlhf_core.util.atomic_files import write_text

    written = table(records, facts)
    write_text(output / "table.md", written)
    write_text(output / "comparison.json", json.dumps({**facts, "runs": records}, indent=1) + "\n")
    plot(records, output / "comparison")
    if page:
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{page} lacks the marks {BEGIN} and {END} around the table")
        write_text(page, f"{before}{begin}\n\n{written}\n{end}{after}")


def table(records: Sequence[Record], facts: Record) -> str:
    """Return a row per method: means over finished seeds, with standard errors over seeds."""
    whole = [record for record in records if record["finished"]]
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    if whole:
        begun = [spread([record["start"][name] for record in whole], digits) for name, digits in COLUMNS]
        lines.append(f"| before training | | | | | {begun[0]} | 0 | {begun[2]} | |")
    for method, title in METHODS.items():
        own = [record for record in whole if record["method"] == method]
        if own:
            cells = [
                spread([mean(record["steps"]["reward"][:3]) for record in own], 3),
                spread([mean(record["steps"]["reward"][-3:]) for record in own], 3),
                spread([mean(record["steps"]["kl"][-3:]) for record in own], 1),
                *(spread([record["heldout"][name] for record in own], digits) for name, digits in COLUMNS),
                f"{mean(mean(record['steps']['seconds']) for record in own):.2f}",
            ]
            lines.append(f"| {title} | {len(own)} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{facts['device']}, {facts['finished']} of {facts['planned']} runs, up to {facts['jobs']} at a time.",
        "",
    ]
    return "\n".join(lines)


COLUMNS = (("reward", 3), ("kl", 2), ("tokens", 1))
"""Held-out figures and their decimals."""


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard error of the mean; the mean alone for one value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.{digits}f}"


def plot(records: Sequence[Record], stem: Path) -> None:
    """Draw reward and KL by completions sampled: means over seeds, bands of a standard error. Nothing without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    from rlhf_core.analysis.figures import figure

    panels = {
        "reward": "training reward, mean of 3 steps",
        "kl": "KL to the start, nats per completion",
    }
    with figure(stem, ("svg",), len(panels)) as axes:
        for axis, (name, label) in zip(axes, panels.items(), strict=True):
            for k, (method, title) in enumerate(METHODS.items()):
                own = [record["steps"][name] for record in records if record["finished"] and record["method"] == method]
                if own:
                    draw_band(axis, [smooth(values) for values in own], f"C{k}", title)
            axis.set_xlabel("completions sampled")
            axis.set_ylabel(label)
        if axes[0].get_lines():
            axes[0].legend()


def draw_band(axis: Any, curves: Sequence[Sequence[float]], color: str, label: str) -> None:
    """Draw the mean of curves over seeds, and a standard error on each side of it."""
    columns = list(zip(*curves, strict=False))
    x = [COMPLETIONS * (i + 1) for i in range(len(columns))]
    middle = [mean(values) for values in columns]
    error = [stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in columns]
    axis.plot(x, middle, color=color, label=label)
    move: Callable[[int], list[float]] = lambda sign: [a + sign * b for a, b in zip(middle, error, strict=True)]
    axis.fill_between(x, move(-1), move(1), color=color, alpha=0.15, linewidth=0)


def smooth(values: Sequence[float]) -> list[float]:
    """Return means of three steps, of fewer at the beginning."""
    return [mean(values[max(0, i - 2) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    sys.exit(main())
