"""One update of each algorithm on the device in bfloat16, on the very batches of the same run in float32 on the CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from gpu_checks.measure import timed
from gpu_checks.models import run_of

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_checks.check import Context
    from rlhf_core.contract.batch import Batch

__all__ = ["algorithms"]

TOLERANCE = 0.02
"""Of a loss, absolute and relative: bfloat16 has 8 bits, and logits of a random model are small."""


def odd_tokens(completions: list[str], **_: Any) -> list[float]:
    """Reward completions by their letters, so that those of a group differ though all are cut at the same length."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


ONLINE = {
    "reward": odd_tokens,
    "batch_size": 4,
    "sampling": {"n": 4, "max_new_tokens": 24},
}
RUNS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 8},
    "dpo": {"batch_size": 8},
    "ppo": ONLINE,
    "grpo": ONLINE,
    "repulse": ONLINE,
}


def algorithms(context: Context) -> None:
    """Sft, dpo, ppo, grpo and repulse: with all weights trained, then with adapters; gradient checkpointing in both."""
    data = write_rows(context.folder)
    for name, options in RUNS.items():
        given = {**options, **({"data": data[name]} if name in data else {})}
        for lora in context.pick((False, True), (True,)):
            compare(context, name, given, lora)
        if context.rehearse and name not in ("sft", "grpo"):
            continue
        seconds = timed(lambda given=given, name=name: whole_run(context, name, given))  # type: ignore[misc]
        context.row(run=f"{name}, 2 steps, from start to export", seconds=seconds)


def write_rows(folder: Path) -> dict[str, Any]:
    """Write demonstrations and pairs; returns `data` by algorithm."""
    demonstrations = [{"prompt": f"Count to {i}.", "completion": " ".join(map(str, range(i)))} for i in range(4, 36)]
    pairs = [
        {"prompt": f"Count to {i}.", "chosen": "1 2 3 " * (i % 7), "rejected": "No. " * (i % 5 + 1)}
        for i in range(4, 36)
    ]
    found = {}
    for name, rows in (("sft", demonstrations), ("dpo", pairs)):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        found[name] = {"use": "json", "path": str(path)}
    return found


def compare(context: Context, name: str, options: dict[str, Any], lora: bool) -> None:
    """Record the batches that each role is trained on in float32 on the CPU, and train on them on the device in bfloat16."""
    roles = {"lora": {"rank": 8}} if lora else {}
    role = "actor"
    common = {**options, "model": "tiny:layers=3,hidden=128,heads=4", "seed": 7, "steps": 2}
    expected, work = recorded(context, name, {**common, role: roles})
    narrow = {**roles, "gradient_checkpointing": True}
    run = run_of(context, name, **{**common, role: narrow, "output": str(context.folder / f"{name}-{lora}")})
    with run.place():
        for each, batches in work.items():
            metrics = run.roles[each].train(batches)
            found, right = metrics[f"loss/{each}"], expected[each][f"loss/{each}"]
            close = abs(found - right) <= TOLERANCE * max(1.0, abs(right))
            norms = (expected[each][f"grad_norm/{each}"], metrics[f"grad_norm/{each}"])
            what = f"{name}{', adapters' if lora else ''}: the {each}'s loss"
            context.expect(
                what, close, f"{right:.6f} float32, {found:.6f} bfloat16; gradient norms {norms[0]:.5f}, {norms[1]:.5f}"
            )


def recorded(
    context: Context, name: str, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Batch]]]:
    """Run one iteration on the CPU; returns each role's metrics, and what it was trained on."""
    from rlhf_core.loop import collect, credit

    cpu = {
        "dtype": "float32",
        "strategy": {"use": "torch", "device": "cpu"},
        "output": str(context.folder / f"cpu-{name}"),
    }
    run = run_of(context, name, **{**options, **cpu, "output": f"{cpu['output']}-{'lora' in options['actor']}"})
    metrics: dict[str, Any] = {}
    work: dict[str, dict[str, Batch]] = {}
    with run.open():
        iteration = next(iter(run.iterations(collect)))
        credited = credit(run, iteration)
        for role in iteration.plan.trained_roles:
            work[role] = {key: credited[key] for key, _ in run.plan.roles[role].terms if key in credited}
            metrics[role] = run.roles[role].train(work[role])
            credited |= credit(run, iteration, after=role)
    return metrics, work


def whole_run(context: Context, name: str, options: dict[str, Any]) -> None:
    """Train two steps on the device and export."""
    output = context.folder / f"run-{name}"
    run = run_of(context, name, "tiny", **{**options, "steps": 2, "output": str(output)})
    result = run.train()
    losses = [value for metric, value in result.metrics.items() if metric.startswith("loss/")]
    context.expect(
        f"{name}: a run of 2 steps ends with finite losses", bool(torch.tensor(losses).isfinite().all()), str(losses)
    )
