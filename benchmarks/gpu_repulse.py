"""RePULSe and its baselines on a GPU: the toy of section 4.2 at the paper's budget of samples, with SmolLM2-135M-Instruct.

Every run is one of recipes/repulse/smollm2-sweep.toml with the paper's samples: 500 per step of each model that is sampled, and
250,000 in all. RePULSe samples two models and so has half the steps. log P(bad) is exact: all outputs are enumerated.

Several runs share the GPU, a process each. After every run the page, the figure and OUTPUT/state.jsonl are written again. A
study that is cut keeps what it has, and a later lending continues it with `--earlier state.jsonl`; finished runs
are not repeated.

    python benchmarks/gpu_repulse.py --model /tmp/model/smollm2-135m --output $OUT --minutes 8
    python benchmarks/gpu_repulse.py --model /tmp/model/smollm2-135m --output $OUT --minutes 8 --earlier state.jsonl
    python benchmarks/gpu_repulse.py --rehearse --output rehearsal     # the model tiny, on the CPU, in a minute
    python benchmarks/gpu_repulse.py --list-wheels                     # what to carry; gpu_model.py carries the model

Nothing needs to be installed but torch and transformers: the sources are run as they lie here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import source_tree
from source_tree import ROOT
from timed_runs import SHARED_ROLLOUT, Planned, TimedRuns, quiet_environment

WHEELS = ["tomli-w", "gguf==0.19.0", "alt-profanity-check==1.9.1", "scikit-learn==1.9.1"]
"""Packages that the runs need and that a machine with torch and transformers may lack; `gguf` unpacks the model."""
POINTS = 10
"""Evaluations of a run, beside the one before its first step."""
SERIES = {"logprob": "eval/bad/logprob", "reward": "reward/mean"}


def main() -> int:
    """Run what is missing while time remains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, default=Path("gpu-repulse"), help="page, figure, numbers and state")
    parser.add_argument("--earlier", type=Path, help="state.jsonl of an earlier lending")
    parser.add_argument("--minutes", type=float, default=8.0, help="everything ends within this time")
    parser.add_argument("--jobs", type=int, default=8, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=10, help="at most so many seeds, one after another")
    parser.add_argument("--n", type=int, default=500, help="samples of a step and model")
    parser.add_argument("--samples", type=int, default=250_000, help="samples of a run, of all its models")
    parser.add_argument("--methods", nargs="+", help="of the recipe; all where absent")
    parser.add_argument("--rehearse", action="store_true", help="the model tiny and few samples, to try the script")
    parser.add_argument("--list-wheels", action="store_true", help="print the command that fetches what to carry")
    options = parser.parse_args()
    if options.list_wheels:
        print(source_tree.download_line(WHEELS))
        return 0
    if options.rehearse:
        options.model, options.n, options.samples, options.seeds, options.jobs = "tiny", 8, 160, 1, 2
    source_tree.activate()
    quiet_environment()

    def write(records: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        write_pages(
            records, {**facts, "model": Path(options.model).name, "n": options.n, "samples": options.samples}, options
        )

    runs = TimedRuns(
        options.output, plan(options), options.jobs, options.minutes, read_points, write, earlier=options.earlier
    )
    well = runs.run()
    print((options.output / "repulse.md").read_text(encoding="utf-8"))
    return int(not well)


def plan(options: argparse.Namespace) -> list[Planned]:
    """Return the runs of the recipe at the budget that is asked for: all methods of a seed before the next seed."""
    from rlhf_core.analysis.sweep import read_sweep

    recipe = "tiny-sweep.toml" if options.rehearse else "smollm2-sweep.toml"
    sweep = read_sweep(ROOT / "recipes" / "repulse" / recipe)
    settings = {member.method: dict(member.settings) for member in sweep.members}
    if unknown := set(options.methods or ()) - set(settings):
        raise SystemExit(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(settings)}")
    most = max(tree["steps"] for tree in settings.values())
    planned = []
    for seed in range(options.seeds):
        for method in options.methods or settings:
            tree = settings[method]
            steps = max(1, round(options.samples / options.n * tree["steps"] / most))
            changed = {
                **tree,
                "model": options.model,
                "seed": seed,
                "steps": steps,
                "eval_every": max(1, steps // POINTS),
                "sampling": {**tree["sampling"], "n": options.n},
                "data": {**tree["data"], "path": str(ROOT / tree["data"]["path"])},
                "evaluator": {**tree["evaluator"], "tolerance": 0.0, "most": 0, "batch": 2048},
                "micro_tokens": 65536,  # all samples of a step in one pass
                "rollout": SHARED_ROLLOUT,
            }
            changed.pop("output")
            planned.append(Planned(f"{method}-seed{seed}", method, seed, changed))
    return planned


def read_points(member: Any) -> dict[str, Any]:
    """Return (samples, value) of the exact log P(bad) and of the mean reward of every step."""
    from rlhf_core.cli.curves import series

    return {name: [[x, round(y, 5)] for x, y in series(member, metric, "samples")] for name, metric in SERIES.items()}


def write_pages(records: list[dict[str, Any]], facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Write page, figure and numbers."""
    from gpu_repulse_page import draw, page

    from rlhf_core.util.atomic_files import write_text

    drawn = draw(records, options.output / "repulse")
    write_text(options.output / "repulse.md", page(records, facts, drawn))
    write_text(options.output / "repulse.json", json.dumps({**facts, "runs": records}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
