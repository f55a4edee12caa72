"""Faults, drawn from a seed, in runs on a cluster of three logical nodes: a process of its own, one line of JSON per run.

    python ray_chaos.py --seeds 0 1 2 --steps 60 --faults 3 --output FOLDER

A fault kills or stops a rollout engine or a rank of the actor, or kills a node with all who sit there, at a moment within a
step that is drawn, too. The line has what was hit, what was counted as recovered, and what differs from an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from rlhf_core import Registry, Run, hookimpl
from rlhf_core.config.builder import parse

JOB = (
    "grpo --model tiny --data prompts --reward length --sampling.n 2 --sampling.max-new-tokens 6 --batch-size 4".split()
)
JOB += ["--actor.optim.lr", "1e-3"]
SETTLED = 4
"""Steps between two faults, at the least: a fault in the middle of a recovery is another test."""
NODE_CPUS = 4
MEASURED = ("time/", "speed/", "memory/", "sync/", "padding", "recovered/")


class Nodes:
    """A cluster whose nodes notice within seconds that one is gone."""

    def __init__(self) -> None:
        noticed = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 1000,
            "health_check_failure_threshold": 5,
        }
        head = {"num_cpus": NODE_CPUS, "_system_config": noticed}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.others = [self._add(), self._add()]

    def _add(self) -> Any:
        return patiently(lambda: self.cluster.add_node(num_cpus=NODE_CPUS))

    def kill(self, node_id: str) -> None:
        """Kill a node."""
        node = next(each for each in self.others if each.node_id == node_id)
        self.others.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def complete(self) -> None:
        """Let other nodes join for those that were killed. Ray starts nodes in the main thread only."""
        while len(self.others) < 2:
            self.others.append(self._add())


def patiently(start: Any) -> Any:
    """Start a node; Ray gives it 30 s, which is little beside much other work."""
    for attempt in range(5):
        try:
            return start()
        except Exception as error:
            if attempt == 4 or "timed out during startup" not in str(error):
                raise
    raise AssertionError


class Chaos:
    """Injects faults, and notes which rows each step was trained on."""

    def __init__(self, seed: int, steps: int, faults: int, nodes: Nodes | None) -> None:
        self.random, self.nodes = random.Random(seed), nodes
        slots = range(2, steps - 3, SETTLED)  # the last steps are there to find out what is dead
        self.steps = sorted(self.random.sample(slots, min(faults, len(slots)))) if nodes is not None else []
        self.uids: dict[int, list[int]] = {}
        self.injected: list[dict[str, Any]] = []
        self.timers: list[threading.Timer] = []

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.uids[step] = run.samples["actor"]["uids_N"].tolist()  # of a step that comes again, the last time counts
        if self.nodes is not None:
            self.nodes.complete()
        if step in self.steps:
            self.steps.remove(step)
            timer = threading.Timer(self.random.uniform(0.0, 0.5), self._strike, [run, step])
            timer.start()
            self.timers.append(timer)

    def _strike(self, run: Run, step: int) -> None:
        assert run.placed is not None and self.nodes is not None
        groups: dict[str, Any] = {**run.roles, "engine": run.placed.rollout}
        where = {
            name: ray.get([a.__ray_call__.options(concurrency_group="pulse").remote(node_of) for a in g.crew.actors])
            for name, g in groups.items()
        }
        kind = self.random.choice(["engine", "actor", "node"])
        number = self.random.choice([signal.SIGKILL, signal.SIGSTOP])
        mine = {node.node_id for node in self.nodes.others}
        seated = sorted({node for homes in where.values() for node in homes} & mine)
        if kind == "node" and seated:
            node = self.random.choice(seated)
            hit = [name for name, homes in where.items() for home in homes if home == node]
            self.nodes.kill(node)
            told: dict[str, Any] = {"what": "node"}
        else:
            kind = "actor" if kind == "node" else kind
            rank = self.random.randrange(len(groups[kind].crew))
            os.kill(groups[kind].crew.where[rank][1], number)
            hit, told = [kind], {"what": f"{kind} {rank}", "signal": number.name}
        engines = hit.count("engine")
        self.injected.append({**told, "step": step, "engines": engines, "roles": int(len(hit) > engines)})


def node_of(_: Any) -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


def run(words: list[str], output: Path, chaos: Chaos) -> list[dict[str, Any]]:
    registry = Registry()
    registry.register(chaos, name="chaos")
    Run(parse([*words, "--output", str(output)], registry), registry).train()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def computed(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}


def compare(expected: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float:
    """The largest difference in any number that is computed; infinite where steps or names differ."""
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        return float("inf")
    pairs = [(computed(a), computed(b)) for a, b in zip(expected, rows, strict=True)]
    if any(a.keys() - b.keys() for a, b in pairs):
        return float("inf")
    return max(abs(a[name] - b[name]) for a, b in pairs for name in a)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--faults", type=int, default=3)
    parser.add_argument("--patience", type=float, default=20.0)
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    job = [*JOB, "--steps", str(chosen.steps)]
    calm = Chaos(0, chosen.steps, 0, None)
    expected = run(job, chosen.output / "undisturbed", calm)
    nodes = Nodes()
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="ERROR")
    flags = "--launcher ray --launcher.cpus 0.1 --launcher.workers 2 --launcher.engines 2 --launcher.strategy SPREAD".split()
    flags += ["--launcher.patience", str(chosen.patience)]
    for seed in chosen.seeds:
        kept = ["--launcher.snapshot-every", "1"] if seed % 2 == 0 else ["--save-every", "3"]
        chaos, began = Chaos(seed, chosen.steps, chosen.faults, nodes), time.monotonic()
        rows = run([*job, *flags, *kept], chosen.output / str(seed), chaos)
        for timer in chaos.timers:
            timer.join()
        print(
            json.dumps(
                {
                    "seed": seed,
                    "injected": chaos.injected,
                    "roles": sum(row.get("recovered/roles", 0) for row in rows),
                    "engines": sum(row.get("recovered/engine", 0) for row in rows),
                    "seconds": sum(
                        row.get("recovered/seconds", 0) + row.get("recovered/engine_seconds", 0) for row in rows
                    ),
                    "all_seconds": time.monotonic() - began,
                    "difference": compare(expected, rows),
                    "same_uids": chaos.uids == calm.uids,
                    "reward": [expected[-1]["reward/mean"], rows[-1]["reward/mean"]],
                }
            ),
            flush=True,
        )
    ray.shutdown()
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
