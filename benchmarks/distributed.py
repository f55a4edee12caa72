"""Overhead of Ray and DeepSpeed per iteration: the same GRPO run in one process, under each engine, and on two ranks.

    python3 benchmarks/distributed.py --model tiny
    python3 benchmarks/distributed.py --model smollm2-135m --prompts 4 --completions 2 --engines local "ray 1" "deepspeed 2 x 1"

Every engine is a process (or two ranks) of its own, started anew in each round, in turn, so that a machine's moods hit all
alike. Of an iteration's seconds the least and the median over all rounds are printed, the first step of each left out, and the
CPU seconds of all its processes together, for machines that have other work. One thread a process.

What crosses processes in an iteration is counted where it is sent: under Ray every object that is put or returned, pickled
(batches and answers), the weights of a sync, and the calls that the controller makes; under DeepSpeed the tensors that a rank
hands to a collective. Engines that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

SHARE_GIB = 0.095
"""GiB that roles and engine of `ray hybrid` may hold at once. The forecast for the tiny model is 0.121 together and 0.089
at most alone, so that the engine sleeps while a role trains."""
PPO = {"algorithm": "ppo", "reward": {"use": "model_role"}, "reward_model": {"model": "tiny"}}
"""Four roles: actor, critic, reference and reward model."""

ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "local": (1, {}),
    "ray 1": (1, {"launcher": {"use": "ray", "cpus": 0.1}}),
    "ray 2": (1, {"launcher": {"use": "ray", "cpus": 0.1, "workers": "2"}}),
    "ray separate": (1, {"launcher": {"use": "ray", "cpus": 0.1, "place": "separate"}}),
    "ray hybrid": (1, {"launcher": {"use": "ray", "cpus": 0.1, "share_memory": "on", "share_gib": SHARE_GIB}}),
    "local ppo": (1, PPO),
    "ray ppo in turn": (1, {**PPO, "launcher": {"use": "ray", "cpus": 0.1}}),
    "ray ppo at once": (1, {**PPO, "launcher": {"use": "ray", "cpus": 0.1, "place": "separate"}}),
    **{
        f"deepspeed {stage} x {ranks}": (ranks, {"strategy": {"use": "deepspeed", "stage": stage}})
        for ranks in (1, 2)
        for stage in (0, 2, 3)
    },
    "torch x 2": (2, {}),
}
"""Name: number of processes, and what is chosen beside the run's own options. `in turn` and `at once` are roles that share a
bundle, and roles that share none."""

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_fn",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "allgather_fn",
    "broadcast",
)


def main() -> None:
    args = arguments()
    if args.child:
        child(args)
        return
    found: dict[str, list[dict[str, float]]] = {}
    chosen = [name for name in args.engines if find_spec(name.split()[0]) is not None or name[:5] in ("local", "torch")]
    for _ in range(args.rounds):
        for name in chosen:
            found.setdefault(name, []).extend(measure(name, args)[1:])
            print(f"measured {name}", file=sys.stderr, flush=True)
    print(
        f"grpo, {args.model}, {args.prompts} prompts x {args.completions} x {args.tokens} tokens, {args.rounds} rounds"
    )
    print(
        f"{'':18} {'least s':>9} {'median s':>9} {'added s':>9} {'CPU s':>8} {'added':>8} {'MiB':>9} {'KiB a sample':>13} "
        f"{'calls':>6} {'of a sync':>9} {'its MiB':>8}"
    )
    for name, steps in found.items():
        best = least(steps)
        base = "local ppo" if "ppo" in name else "local"
        local = least(found[base]) if base in found else {"seconds": float("nan"), "cpu": float("nan")}
        middle, moved, calls, sync, synced = (
            median(step[key] for step in steps) for key in ("seconds", "bytes", "calls", "sync_calls", "sync_bytes")
        )
        row = f"{best['seconds']:9.3f} {middle:9.3f} {best['seconds'] - local['seconds']:9.3f} {best['cpu']:8.3f} "
        samples = args.prompts * args.completions
        row += f"{best['cpu'] - local['cpu']:8.3f} {moved / 2**20:9.2f} {moved / 2**10 / samples:13.1f} "
        row += f"{calls:6.0f} {sync:9.0f} {synced / 2**20:8.2f}"
        print(f"{name:18} {row}", flush=True)


def least(steps: list[dict[str, float]]) -> dict[str, float]:
    """The least of each number, over the steps."""
    return {key: min(step[key] for step in steps) for key in ("seconds", "cpu")}


def measure(name: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds and bytes of every step of a run under an engine."""
    ranks, _ = ENGINES[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        options = [
            part
            for key in ("model", "prompts", "completions", "tokens", "steps")
            for part in (f"--{key}", str(getattr(args, key)))
        ]
        words = [*(command if ranks > 1 else [sys.executable]), __file__, *options, "--child", name, "--folder", folder]
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **quiet})
        if done.returncode:
            sys.exit(f"{name} did not run:\n{done.stderr[-3000:]}")
        steps: list[dict[str, float]] = json.loads(Path(folder, "steps.json").read_text(encoding="utf-8"))
    return steps


def child(args: argparse.Namespace) -> None:
    """The run itself."""
    from rlhf_core import Registry, Run, make_config

    _, chosen = ENGINES[args.child]
    registry = Registry()
    options = {"algorithm": "grpo", "reward": "length", **chosen}
    config = make_config(
        options.pop("algorithm"), registry, model=args.model, data="prompts", steps=args.steps, batch_size=args.prompts,
        sampling={"n": args.completions, "max_new_tokens": args.tokens}, output=f"{args.folder}/run", **options,
    )  # fmt: skip
    crossed = Crossed()
    counted = crossed.by_ray if "launcher" in chosen else crossed.by_collectives
    steps: list[dict[str, float]] = []

    class Watched(Run):
        def finish(self, iteration: Any, credited: Any) -> None:
            super().finish(iteration, credited)
            cpu = sum(self.world.gather(cpu_seconds()))
            moved, calls = crossed.taken()
            sync = self.last_metrics.get("sync/controller_calls", 0.0)
            seconds = self.last_metrics["time/step"]
            synced = self.last_metrics.get("sync/bytes", 0.0)
            moved += synced
            steps.append(
                {
                    "seconds": seconds,
                    "cpu": cpu,
                    "bytes": moved,
                    "calls": calls,
                    "sync_calls": sync,
                    "sync_bytes": synced,
                }
            )

    run = Watched(config, registry)
    counted()
    run.train()
    clock = [step["cpu"] for step in steps]
    for step, before, after in zip(steps, [0.0, *clock], clock, strict=False):
        step["cpu"] = after - before
    if run.world.rank == 0:
        Path(args.folder, "steps.json").write_text(json.dumps(steps), encoding="utf-8")


def cpu_seconds() -> float:
    """CPU time of this process and all that it started, which under Ray are its workers."""
    parents, times = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(stat.parent.name)], times[int(stat.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(times.get(pid, 0) for pid in mine) / os.sysconf("SC_CLK_TCK")


class Crossed:
    """Bytes that left this process, and calls of Ray's actors, since they were last asked for."""

    def __init__(self) -> None:
        self.bytes = self.calls = 0

    def taken(self) -> tuple[int, int]:
        """Return what was counted since the last call: bytes, and calls."""
        found = self.bytes, self.calls
        self.bytes = self.calls = 0
        return found

    def by_ray(self) -> None:
        """Count what is put into the object store here, and the answers that come back."""
        import ray

        from rlhf_distributed_ray.crew import Crew

        put, wait = ray.put, Crew.wait

        def counting_put(thing: Any, *args: Any, **kwargs: Any) -> Any:
            self.bytes += len(pickle.dumps(thing, protocol=5))
            return put(thing, *args, **kwargs)

        def counting_wait(crew: Crew, references: Any, *args: Any, **kwargs: Any) -> Any:
            outcomes = wait(crew, references, *args, **kwargs)
            self.calls += len(references)
            self.bytes += sum(len(pickle.dumps(answer, protocol=5)) for answer in outcomes.results.values())
            return outcomes

        ray.put, Crew.wait = counting_put, counting_wait

    def by_collectives(self) -> None:
        """Count the tensors that this rank hands to a collective of torch, through which DeepSpeed's go too."""
        import torch

        for name in COLLECTIVES:
            if hasattr(torch.distributed, name):
                setattr(torch.distributed, name, self._counting(name, getattr(torch.distributed, name)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def counting(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in flat([*args, *kwargs.values()]) if isinstance(each, torch.Tensor)]
            sizes = [each.numel() * each.element_size() for each in tensors]
            if "gather" in name:
                self.bytes += min(sizes, default=0)  # this rank's part; the rest is where the others' go
            else:
                self.bytes += sum(sizes) - ("scatter" in name) * min(sizes, default=0)
            return call(*args, **kwargs)

        return counting


def flat(things: Any) -> Iterator[Any]:
    """Everything in nested lists."""
    for thing in things:
        if isinstance(thing, (list, tuple)):
            yield from flat(thing)
        else:
            yield thing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=4, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
