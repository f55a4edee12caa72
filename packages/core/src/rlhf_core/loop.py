"""The loop. One prompt can be followed here from data to update, for every algorithm, online and offline.

    prompts       completions     score          credit           objective      weights
    data  ─────▶  rollout  ────▶  reward  ────▶  advantage ────▶  loss  ──────▶  update

An algorithm is its terms, (role trained, source, advantage, loss); the loop knows no algorithm. Whether roles live in this
process, in other ranks or in Ray actors is decided by the launcher; the loop does not know.

Not here on purpose: tokenizing (`data.encoder`), sampling and scoring (`run.iteration`), reductions and micro-batches
(`training`), checkpoints and observers (`run`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rlhf_core.contract.plan import DATA
from rlhf_core.training.credit import assign_credit, compute_needs

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.loop_view import LoopIteration, LoopRun

__all__ = ["collect", "credit", "train", "update"]


def train(run: LoopRun) -> None:
    """Train on every remaining iteration of `run`."""
    for iteration in run.iterations(collect):
        credited = credit(run, iteration)
        update(run, iteration, credited)
        run.finish(iteration, credited)


def collect(iteration: LoopIteration) -> None:
    """Give each source its batch: read from data, or sampled from a role on this step's prompts and scored."""
    for source in iteration.plan.sources:
        if source == DATA:
            iteration.read()
        else:
            iteration.score(source, iteration.sample(source))


def credit(run: LoopRun, iteration: LoopIteration, after: str = "") -> dict[str, Batch]:
    """Return a batch per credit: with what its losses and advantage need, and what each token earned.

    `after` names a role that has just been updated, for the terms that wait for it (`Term.after`).
    """
    plan = iteration.plan
    credited: dict[str, Batch] = {}
    specs = [spec for spec in plan.credits.values() if spec.after == after]
    if after and not specs:
        return credited
    with run.phase("needs"):
        for source, batch in iteration.batches.items():
            iteration.batches[source] = compute_needs(plan, run.roles, source, batch, after, together=run.together)
    with run.phase("credit"):
        for spec in specs:
            batch, rewards = iteration.batches[spec.source], iteration.rewards.get(spec.source)
            engine = run.advantages.get(spec.key)
            credited[spec.key], metrics = assign_credit(run.plan, spec, batch, rewards, run.kl_coef, engine)
            run.log(metrics)
    if not after:
        run.watch(iteration.batches)
    return credited


def update(run: LoopRun, iteration: LoopIteration, credited: dict[str, Batch]) -> None:
    """Let each trained role take its optimizer steps; then sampling sees the new weights."""
    for wave in iteration.plan.update_waves:  # roles that do not wait for each other
        calls = {}
        for name in wave:
            run.notify("rlhf_before_update", role=name)
            work = {key: credited[key] for key, _ in run.plan.roles[name].terms if key in credited}
            calls[name] = partial(run.roles[name].train, work)
        with run.phase("train"):
            for metrics in run.together(calls).values():
                run.log(metrics)
        credited |= credit(run, iteration, after=wave[-1])
    with run.phase("sync"):
        run.sync()
