"""Schedules of the GCG attack at equal operations: attacks, their records, and the table of means.

A part is one schedule with one seed on all goals. Parts run in this process one by one, or as several processes, which is how a
GPU is filled. Records are written after every few goals, so that a cut run keeps what it has.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["PARTS", "SUFFIX", "best_until", "compare_schedules", "load", "read_goals", "run_part", "table"]

SUFFIX = "x x x x x x x x x x"
PARTS = (0.25, 0.5, 1.0)
"""Shares of the operations at which losses are compared."""
ON_GPU = 262144
"""Tokens of a pass there: a large GPU waits for launches below."""

Record = dict[str, Any]


def read_goals(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (goal, target) of the package's harmless goals."""
    with (files("rlhf_eval_gcg.goals") / "harmless.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["goal"], row["target"]) for row in csv.DictReader(file)][: options.goals]
    words = options.target_words
    return [(goal, " ".join(target.split()[:words]) if words else target) for goal, target in rows]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return model and tokenizer, on the device and on one thread."""
    import torch

    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.models.loading.load import load_model
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(
        "high"
    )  # TF32 on a GPU, no change on a CPU; final losses are computed without it
    return load_model(options.model, ModelOptions()).to(options.device), load_tokenizer(options.model, ModelOptions())


def compare_schedules(options: argparse.Namespace) -> None:
    """Attack every goal with every seed and schedule; print and write the table of means."""
    parts = [(name, seed) for seed in range(options.seeds) for name in options.schedules]
    records: list[Record] = []
    began = time.monotonic()
    for found in run_parts(parts, options):
        records += found
        text = table(records, options)
        if options.output:
            write(records, text, options.output)
    print(table(records, options))
    print(
        f"{len(records)} attacks in {time.monotonic() - began:.0f} s on {options.device}, {options.processes} at a time"
    )


def run_parts(parts: Sequence[tuple[str, int]], options: argparse.Namespace) -> Iterator[list[Record]]:
    """Yield the records of parts as they come; those that do not end in time are cut."""
    if options.processes == 1:
        for name, seed in parts:
            yield from run_part(name, seed, options)
        return
    deadline = time.monotonic() + 60 * options.minutes
    waiting, running = list(parts), list[subprocess.Popen[str]]()
    read: dict[Any, int] = {}
    while waiting or running:
        while waiting and len(running) < options.processes:
            name, seed = waiting.pop(0)
            running.append(start(name, seed, options))
        time.sleep(0.2)
        late = time.monotonic() > deadline
        for process in list(running):
            ended = process.poll() is not None
            if late and not ended:
                process.kill()
                process.wait()
            file = part_file(process)
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            fresh = [json.loads(line) for line in lines[read.get(file, 0) :] if line.endswith("}")]
            read[file] = read.get(file, 0) + len(fresh)
            if fresh:
                yield fresh
            if ended or late:
                running.remove(process)
                if process.returncode and not late:
                    print(f"{file.name} failed; see its messages above", file=sys.stderr)
        if late:
            return


def start(name: str, seed: int, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a part as a process of its own, which writes its records to a file."""
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"part-{name.replace(':', '.')}-{seed}.jsonl"
    file.unlink(missing_ok=True)
    words = [
        sys.executable,
        str(Path(__file__).with_name("gcg.py")),
        "--child",
        "part",
        "--part",
        name,
        str(seed),
        str(file),
    ]
    for option in ("model", "device", "goals", "flops", "width", "dtype", "target_words", "at_once"):
        words += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    return subprocess.Popen(words, text=True, env=env, stdout=subprocess.DEVNULL)


def part_file(process: subprocess.Popen[str]) -> Path:
    """Return the file of a part's records."""
    words = process.args
    assert isinstance(words, list)
    return Path(words[words.index("--part") + 3])


def run_part(name: str, seed: int, options: argparse.Namespace) -> Iterator[list[Record]]:
    """Attack all goals with one schedule and seed, a few at a time; yield their records."""
    import copy

    import torch

    from rlhf_eval_gcg.attack import Attack, Goal, attack

    model, tokenizer = load(options)
    searched = copy.deepcopy(model).to(getattr(torch, options.dtype))
    goals = read_goals(options)
    on_gpu = options.device != "cpu"
    attacked = Attack(
        steps=1_000_000, max_flops=options.flops, schedule=name, search_width=options.width, suffix=SUFFIX,
        goals_at_once=options.at_once, **({"batch_tokens": ON_GPU} if on_gpu else {}),
    )  # fmt: skip
    for first in range(0, len(goals), options.at_once):
        few = [Goal(goal, target) for goal, target in goals[first : first + options.at_once]]
        began, cpu = time.monotonic(), time.process_time()
        results = attack(searched, tokenizer, few, attacked, seed=1000 * seed + first)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        found = []
        for goal, result in zip(few, results, strict=True):
            reached = [best_until(result, share * options.flops) for share in PARTS]
            record = {
                "schedule": name, "goal": goal.goal, "seed": seed, "initial": result.initial_loss, "reached": reached,
                "exact": loss_of(model, result), "steps": result.steps, "candidates": result.candidates,
                "flops": result.flops[-1], "seconds": seconds / len(few), "cpu": cpu / len(few),
            }  # fmt: skip
            print(
                f"{name:9} {goal.goal[:32]:32} seed {seed}: {result.initial_loss:.3f} to {record['exact']:.3f} (search: "
                f"{', '.join(f'{each:.3f}' for each in reached)}), {result.steps} steps, {result.candidates} candidates, "
                f"{record['seconds']:.1f} s, {record['cpu']:.1f} CPU s",
                flush=True,
            )
            found.append(record)
        yield found


def best_until(result: Any, flops: float) -> float:
    """Return the lowest loss within a number of operations; the initial one where the first step took more."""
    found = [loss for loss, spent in zip(result.losses, result.flops, strict=True) if spent <= flops]
    return float(min(found, default=result.initial_loss))


def loss_of(model: Any, result: Any) -> float:
    """Return the mean cross-entropy of the target after the prompt, from plain transformers without TF32."""
    import torch

    row = torch.tensor([[*result.prompt_ids, *result.target_ids]], device=model.device)
    labels = row.clone()
    labels[0, : len(result.prompt_ids)] = -100
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        loss = float(model(input_ids=row, labels=labels).loss)
    torch.set_float32_matmul_precision(chosen)
    return loss


def table(records: Sequence[Record], options: argparse.Namespace) -> str:
    """Return means over the goals and seeds that every schedule has attacked, and the ratio to the first schedule."""
    pairs = {name: {(r["goal"], r["seed"]): r for r in records if r["schedule"] == name} for name in options.schedules}
    shared = sorted(set.intersection(*(set(each) for each in pairs.values())))
    head = " | ".join(f"loss at {share:.0%}" for share in PARTS)
    lines = [
        f"Means over {len(shared)} attacks of {options.flops:.1e} operations, {options.dtype}, nats per token of the target.",
        "",
        f"| schedule | {head} | of {options.schedules[0]}'s | with the step beyond, float32 | steps | candidates |",
        "|---" * (len(PARTS) + 5) + "|",
    ]
    if not shared:
        return "\n".join([*lines, ""])
    base = [pairs[options.schedules[0]][pair]["reached"][-1] for pair in shared]
    for name, own in pairs.items():
        rows = [own[pair] for pair in shared]
        reached = [mean(row["reached"][k] for row in rows) for k in range(len(PARTS))]
        ratio = reached[-1] / mean(base)
        changes = [row["reached"][-1] - first for row, first in zip(rows, base, strict=True)]
        error = stdev(changes) / len(changes) ** 0.5 / mean(base) if len(changes) > 1 else 0.0
        lines.append(
            f"| {name} | {' | '.join(f'{loss:.3f}' for loss in reached)} | {ratio:.3f} ± {error:.3f} | "
            f"{mean(row['exact'] for row in rows):.3f} | {mean(row['steps'] for row in rows):.0f} | "
            f"{mean(row['candidates'] for row in rows):.0f} |"
        )
    return "\n".join([*lines, ""])


def write(records: Sequence[Record], text: str, output: Path) -> None:
    """Write records and table."""
    from rlhf_core.util.atomic_files import write_text

    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "gcg.json", json.dumps(list(records), indent=1) + "\n")
    write_text(output / "gcg.md", text)
