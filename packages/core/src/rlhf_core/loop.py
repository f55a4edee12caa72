"""The loop. One prompt can be followed here from data to update, for every algorithm, online and offline.

    prompts       completions     score          credit           objective      weights
    data  ─────▶  rollout  ────▶  reward  ────▶  advantage ────▶  loss  ──────▶  update

An algorithm is its terms, (role trained, source, advantage, loss); the loop knows no algorithm. Whether roles live in this
process, in ranks beside it or in Ray actors is the launcher's business; the loop cannot tell.

Not here on purpose: tokenizing (`data.encoder`), reductions and micro-batches (`training`), checkpoints and observers (`run`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.plan import DATA
from rlhf_core.contract.results import RewardOutput
from rlhf_core.training.credit import assign_credit, compute_needs

if TYPE_CHECKING:
    from rlhf_core.run.run import Run

__all__ = ["train"]


def train(run: Run) -> None:
    """Every remaining step of `run`."""
    for step in run.steps():
        batches, rewards = collect(run)
        credited = credit(run, batches, rewards)
        update(run, credited)
        run.finish(step, credited)


def collect(run: Run) -> tuple[dict[str, Batch], dict[str, RewardOutput]]:
    """A batch per source: read from data, or sampled from a role on this step's prompts and scored."""
    batches: dict[str, Batch] = {}
    rewards: dict[str, RewardOutput] = {}
    rows = run.next_rows()
    for source in run.active_plan.sources:
        if source == DATA:
            batches[source] = run.read(rows)
        else:
            batches[source] = run.sample(source, rows)
            rewards[source] = run.score(source, batches[source])
    return batches, rewards


def credit(run: Run, batches: dict[str, Batch], rewards: dict[str, RewardOutput]) -> dict[str, Batch]:
    """A batch per credit: with what its losses and advantage need, and what each token earned."""
    credited: dict[str, Batch] = {}
    with run.phase("needs"):
        batches = {
            source: compute_needs(run.active_plan, run.roles, source, batch) for source, batch in batches.items()
        }
    with run.phase("credit"):
        for key, spec in run.active_plan.credits.items():
            reward = rewards.get(spec.source)
            credited[key], metrics = assign_credit(run.plan, spec, batches[spec.source], reward, run.kl_coef)
            run.log(metrics)
    run.watch_kl(batches)
    return credited


def update(run: Run, credited: dict[str, Batch]) -> None:
    """Each trained role takes its optimiser steps; then sampling sees the new weights."""
    for name in run.active_plan.trained_roles:
        with run.phase("train"):
            work = {key: credited[key] for key, _ in run.plan.roles[name].terms if key in credited}
            run.log(run.roles[name].train(work))
    with run.phase("sync"):
        run.sync()
