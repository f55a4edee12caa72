"""Overlap of sampling and training with --ahead, for generation times of 1, 2 and 4 times the training's.

    python3 benchmarks/async.py                     # simulated, then measured under Ray
    python3 benchmarks/async.py --learn --seeds 3   # held-out reward in turn and ahead, after the same steps
    python3 benchmarks/async.py --vllm --steps 8    # vLLM in a separate process, without Ray

Simulated: the scheduler alone (`rlhf-run simulate`). Measured: whole runs whose engine is a Ray actor and whose times are those
of the engine `fake` and the strategy `fake`, which really sleep. Everything but the arithmetic of a model is there, also the
object store, the weight sync and scoring, and a machine with few cores can show it. Overlap is the time that a step ahead saves
over the most that could be saved, (in turn - ahead) / (in turn - longer phase). A straggler is a prompt whose completions have
ten times the length: the longest step with it, over the median step, in simulated time.

With `--vllm` the engine is a real one in a separate process, and training is real, too, without Ray. Each update also sleeps
until it has the stated part of the time of sampling, as if it computed elsewhere: on a small machine both would only compete
for its cores. The first run measures both times without a pause. The last row of each ratio has weights that arrive in the
middle of the engine's call (`--partial.midway`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rlhf_core import Registry, Run, hookimpl, make_config
from rlhf_core.asynchronous.simulation import Workload, simulate
from rlhf_core.util.clock import simulated_time

RATIOS = (1, 2, 4)
LENGTH = 16
COLLECTING = ("data", "rollout", "reward")
"""Phases of a step that the thread ahead of training takes over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--training", type=float, default=1.0, help="seconds of an update")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--learn", action="store_true", help="compare held-out rewards of a model that is really trained"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of --learn")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM in a separate process")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of --vllm: sampling over training")
    args = parser.parse_args()
    if args.vllm:
        measure_vllm(args.ratios, args.steps)
        return
    if args.learn:
        compare_rewards(args.seeds, args.steps)
        return
    print("generation : training   simulated overlap   in turn s   1 ahead s   measured overlap   staleness")
    for ratio in RATIOS:
        workload = Workload(ratio * args.training, args.training)
        simulated = simulate(workload, 1).overlap(workload)
        in_turn, ahead = (measure(ratio * args.training, args.training, args.steps, k) for k in (0, 1))
        saved = (in_turn["step"] - ahead["step"]) / (in_turn["step"] - max(ratio, 1) * args.training)
        print(
            f"{ratio:10} : 1 {simulated:20.2f} {in_turn['step']:15.2f} {ahead['step']:11.2f} {saved:18.2f} "
            f"{ahead['staleness']:11.2f}",
            flush=True,
        )
    measure_straggler()


def measure_straggler() -> None:
    """Print the longest step over the median one where a prompt is ten times as long, sampled whole and in slices."""
    slices = {"partial": {"tokens": LENGTH, "surplus": 1}, "stale": {"most": 12}}
    for name, options in {"whole completions": {}, f"slices of {LENGTH} tokens": slices}.items():
        with simulated_time():
            rows = train(
                rollout={"use": "rlhf_core.testing.straggler:Straggler", "token_seconds": 1 / LENGTH, "length": LENGTH},
                strategy={"use": "fake", "step_seconds": 1.0},
                sampling={"n": 4, "max_new_tokens": 10 * LENGTH},
                batch_size=8,
                steps=30,
                ahead=1,
                **options,
            )[1:]
        times = [row["time/step"] for row in rows]
        print(f"straggler of 10 times the length, {name}: {max(times) / median(times):.2f} of a step", flush=True)


def measure(generation: float, training: float, steps: int, ahead: int) -> dict[str, float]:
    """Return the median seconds of a step under Ray, and the mean age of its tokens; first and last steps are left out."""
    rows = train(
        rollout={"use": "fake", "token_seconds": generation / LENGTH},
        strategy={"use": "fake", "step_seconds": training},
        sampling={"n": 16, "max_new_tokens": LENGTH},  # 256 completions, so that one has every length
        launcher={"use": "ray", "cpus": 0.1},
        batch_size=16,
        steps=steps,
        ahead=ahead,
    )[1:-1]
    return {
        "step": median(row["time/step"] for row in rows),
        "staleness": mean(row["rollout/staleness"] for row in rows),
    }


class Training:
    """Seconds that an update takes elsewhere.

    Args:
        seconds: how long the loop sleeps before it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @hookimpl
    def rlhf_before_update(self) -> None:
        """Sleep, while the engine may sample."""
        time.sleep(self.seconds)


def measure_vllm(ratios: Sequence[float], steps: int) -> None:
    """Print seconds of steps and of their collecting, the share of the possible saving, and the age of tokens, by ratio."""
    print(
        "generation : training   vllm in a separate process   s/step   collecting s   overlap   staleness", flush=True
    )
    plain = sample_vllm(steps, pause=0.0)
    for ratio in ratios:
        pause = max(0.0, plain["collecting"] / ratio - (plain["step"] - plain["collecting"]))
        turn = sample_vllm(steps, pause)
        training = turn["step"] - turn["collecting"]
        for name, options in {"1 ahead": {}, "1 ahead, weights midway": {"partial": {"midway": True}}}.items():
            ahead = sample_vllm(steps, pause, ahead=1, **options)
            overlap = (turn["step"] - ahead["step"]) / min(turn["collecting"], training)
            print(
                f"{turn['collecting'] / training:17.2f} : 1   {name:26} {ahead['step']:8.2f} {turn['collecting']:14.2f} "
                f"{overlap:9.2f} {ahead['staleness']:11.2f}   (in turn {turn['step']:.2f} s)",
                flush=True,
            )


def sample_vllm(steps: int, pause: float, **options: Any) -> dict[str, float]:
    """Return the mean seconds of a step, those of its collecting, and the mean age of tokens, on a machine without other work.

    Args:
        steps: of the run; the first and the last are left out.
        pause: seconds that each update waits.
        options: of the run.
    """
    rows = train(
        plugins=[Training(pause)],
        model="tiny",
        rollout={"use": "vllm", "process": "own", "kv_cache_gib": 0.25, "max_num_seqs": 4},
        sampling={"n": 4, "max_new_tokens": 256},
        batch_size=16,
        steps=steps,
        **options,
    )[1:-1]
    return {
        "step": mean(row["time/step"] for row in rows),
        "collecting": mean(sum(row.get(f"time/{part}", 0.0) for part in COLLECTING) for row in rows),
        "staleness": mean(row["rollout/staleness"] for row in rows),
    }


def compare_rewards(seeds: int, steps: int) -> None:
    """Print the held-out reward after training in turn and ahead, by seed."""
    print("ahead   held-out reward by seed   mean")
    for ahead in (0, 1, 2):
        found = []
        for seed in range(seeds):
            rows = train(
                launcher={"use": "ray", "cpus": 0.1},
                evaluator="heldout",
                sampling={"n": 8, "max_new_tokens": LENGTH},
                actor={"optim": {"lr": 3e-3}},
                batch_size=8,
                steps=steps,
                seed=seed,
                ahead=ahead,
            )
            found.append(rows[-1]["reward"])
        print(f"{ahead:5}   {'  '.join(f'{each:.3f}' for each in found)}   {mean(found):.3f}", flush=True)


def train(plugins: Sequence[object] = (), **options: Any) -> list[dict[str, float]]:
    """Return the metrics of a run of GRPO on the tiny model, a row per step; the last row has the held-out reward."""
    registry = Registry()
    for plugin in plugins:
        registry.register(plugin, name=type(plugin).__name__)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            {"use": "grpo", "kl": {"coef": 0.0}},
            output=f"{folder}/run",
            **{
                "model": "tiny:hidden=32,layers=1",
                "data": "prompts",
                "reward": {"use": "length", "target": 4},
                **options,
            },
        )
        result = Run(config, registry).train()
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        if result.evaluations:
            rows[-1]["reward"] = result.evaluations[-1][1]["eval/heldout/reward"]
        return rows


if __name__ == "__main__":
    main()
