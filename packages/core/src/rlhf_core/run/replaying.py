"""Replays a recorded step: its completions go through reward, credit and loss again, with tapes in place of models.

It is the code of a run: the same iteration, the same `loop.credit` and `loop.update`. No model is loaded, no completion is
sampled, nothing is written. A difference from the record is a difference of code, options or packages since then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from rlhf_core import loop
from rlhf_core.contract.distributed import World
from rlhf_core.contract.plan import DATA, Plan
from rlhf_core.contract.providers import Launcher, Rollout
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import UsageError, run_option, spell_options
from rlhf_core.run.iteration import Iteration
from rlhf_core.run.recording import FOLDER, batch_of, step_file
from rlhf_core.run.run import Run
from rlhf_core.training.joining import join_sources
from rlhf_core.training.running_moments import Moments
from rlhf_core.training.tape import PlayedRole, ReplayDifference, Tape
from rlhf_core.util.tensor_tree import read_tree

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch, Rollouts
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.plugins.registry import Registry

__all__ = ["read_step", "replay_step"]

TOLERANCE = 1e-9
"""Largest difference of two numbers that count as equal, relative to the larger of 1 and their size."""

UNSEEN = ("time/", "speed/", "memory/", "grad_norm/", "lr/", "loss_scale/", "rollout/", "data/")
"""Prefixes of metrics that are not computed again: times, gradients, and sampling itself."""


@dataclass(frozen=True)
class NoEngine(Rollout):
    """Stands for the engine of the record, which is not opened."""

    exact: ClassVar[bool] = False
    """replaced by that of the record's engine"""

    def session(self, role: Any) -> Any:
        """Refuse to sample."""
        raise AssertionError("a replay samples nothing")


@dataclass(frozen=True)
class PlayedRoles(Launcher):
    """Places roles that play tapes."""

    tapes: Mapping[str, Tape]

    one_process: ClassVar[bool] = True

    def __call__(self, plan: Plan) -> Placement:
        """Return the placement."""
        roles = {name: PlayedRole(plan, name, self.tapes.get(name, Tape())) for name in plan.roles}
        return Placement(dict(roles), None, World())


class ReplayRun(Run):
    """A run whose loop goes once over a recorded step. It calls no observer and hands no weights on."""

    def notify(self, hook: str, **arguments: Any) -> list[Any]:
        """Call no observer."""
        return []

    def sync(self) -> None:
        """Move no weights."""

    @cached_property
    def stream(self) -> Any:
        """Read no rows."""
        return SimpleNamespace(reacts=False)


def read_step(output: Path, step: int) -> dict[str, Any]:
    """Return the record of a step.

    Raises:
        UsageError: nothing; the message lists the steps that are recorded.
    """
    path = step_file(output, step)
    if not path.is_file():
        steps = sorted(
            int(each.stem[5:]) for each in (output / FOLDER).glob("step-*.safetensors") if each.stem[5:].isdigit()
        )
        have = (
            f"it has {', '.join(map(str, steps))}" if steps else f"record steps with {run_option('record_every', 'N')}"
        )
        raise UsageError(f"the run {str(output)!r} has no record of step {step}; {have}")
    try:
        tree: dict[str, Any] = read_tree(path)
    except Exception as error:
        raise UsageError(f"{path} is damaged and cannot be replayed: {error}") from None
    return tree


def replay_step(config: RunConfig, registry: Registry, step: int, kept: Mapping[str, Any]) -> dict[str, int]:
    """Compute a recorded step again; return how many numbers of each kind were compared.

    Args:
        config: that of the run.
        registry: its plugins.
        step: the number of the step.
        kept: what `read_step` returned.

    Raises:
        ReplayDifference: something is not as it was; the message names the first tensor, row and token.
    """
    tapes = {name: Tape(**each) for name, each in kept["tapes"].items()}
    providers = {**config.providers, "launcher": PlayedRoles(tapes), "evaluator": (), "observer": ()}
    if "rollout" in providers:
        providers["rollout"] = _silent(providers["rollout"])
    run = ReplayRun(replace(config, providers=providers, resume=False), registry)
    counts: dict[str, int] = {}
    run.engines.load_state_dict(kept["states"])
    with spell_options(config.option_names), run.place():
        if run.state.kl is not None:
            run.state.kl.coef = kept["kl_coef"]
        run.state.step = step - 1
        moments = {source: Moments(*each) for source, each in kept["moments"].items()}
        iteration = Iteration(run, step, kept["kl_coef"], moments)
        _collect(iteration, kept)
        for source, rewards in kept["rewards"].items():
            _compare(
                f"reward of {source}", _tensors(rewards), _tensors(vars(iteration.rewards[source])), counts, "reward"
            )
        credited = loop.credit(run, iteration)
        loop.update(run, iteration, credited)
        for key, extras in kept["credited"].items():
            _compare(f"credit {key}", extras, credited[key].extras, counts, "credit")
        for name, role in run.roles.items():
            assert isinstance(role, PlayedRole)
            _compare_losses(name, tapes[name].losses, role.replayed.losses, counts)
        run.meter.merge(iteration.meter)
        _compare_metrics(kept["metrics"], run.meter.take(), counts)
    return counts


def _silent(rollout: Any) -> NoEngine:
    """Return a provider that samples nothing and declares what `rollout` does."""
    kind = type("NoEngine", (NoEngine,), {"exact": rollout.exact, "min_p_first": rollout.min_p_first})
    made: NoEngine = kind()
    return made


def _collect(iteration: Iteration, kept: Mapping[str, Any]) -> None:
    """Give each source its recorded batch, and score it again where it was sampled."""
    recorded = {
        name: _drop_extra(batch_of(tree), "rewards_N" if name in kept["rewards"] else "")
        for name, tree in kept["batches"].items()
    }
    for source in iteration.plan.sources:
        batch = replace(
            recorded[source], world=iteration.world, step=replace(iteration.info, skip=recorded[source].step.skip)
        )
        if source == DATA:
            iteration.batches[DATA] = batch
        else:
            iteration.score(source, cast("Rollouts", batch))
    iteration.batches |= join_sources(iteration.plan, iteration.batches)


def _drop_extra(batch: Batch, name: str) -> Batch:
    """Return a batch without an extra."""
    return replace(batch, extras={each: values for each, values in batch.extras.items() if each != name})


def _tensors(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors among the fields of rewards, those of its metrics by their names."""
    found = {
        name: value
        for name, value in tree.items()
        if name in ("rewards_N", "rewards_NT", "scores_N") and value is not None
    }
    return found | {f"metric {name}": value for name, value in tree["metrics"].items()}


def _compare(
    where: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor], counts: dict[str, int], kind: str
) -> None:
    """Compare tensors by name, and count their numbers.

    Raises:
        ReplayDifference: one is missing, has another shape, or another number; rows and tokens count from 0.
    """
    for name, old in before.items():
        if name not in now:
            raise ReplayDifference(f"{where}: the record has {name}, but the replay does not")
        new = now[name]
        if old.shape != new.shape:
            raise ReplayDifference(f"{where}: {name} had shape {tuple(old.shape)} and now has shape {tuple(new.shape)}")
        counts[kind] = counts.get(kind, 0) + old.numel()
        place = _first_difference(old, new)
        if place is not None:
            raise ReplayDifference(
                f"{where}: {name} differs first at {_place(place)}: {float(old[place]):.12g} was recorded, "
                f"{float(new[place]):.12g} is computed now"
            )


def _first_difference(old: Tensor, new: Tensor) -> tuple[int, ...] | None:
    """Return the place of the first number that is not equal within the tolerance; None if all are."""
    a, b = old.double(), new.double()
    same = ((a - b).abs() <= TOLERANCE * a.abs().clamp(min=1)) | (a == b) | (a.isnan() & b.isnan())
    places = (~same).nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def _place(index: Sequence[int]) -> str:
    """Return a place in a tensor in words."""
    words = [f"{word} {number}" for word, number in zip(("row", "token"), index)]
    return ", ".join([*words, *map(str, index[2:])]) or "its only number"


def _compare_losses(role: str, before: Sequence[Any], now: Sequence[Any], counts: dict[str, int]) -> None:
    """Compare the values of the losses, micro-batch by micro-batch.

    Raises:
        ReplayDifference: there are more or fewer micro-batches, other rows in one, or another value.
    """
    for number, (old, new) in enumerate(zip(before, now)):
        where = f"loss of {role}, micro-batch {number}"
        if old["rows"] != new["rows"]:
            raise ReplayDifference(f"{where}: its rows differ from the record")
        _compare(where, old["values"], new["values"], counts, "loss")
    if len(before) != len(now):
        raise ReplayDifference(
            f"loss of {role}: {len(before)} micro-batches were recorded, {len(now)} are computed now"
        )


def _compare_metrics(before: Mapping[str, float], now: Mapping[str, float], counts: dict[str, int]) -> None:
    """Compare the metrics that a replay computes.

    Raises:
        ReplayDifference: one is another number.
    """
    for name, new in _comparable(now):
        if name in before:
            old = before[name]
            counts["metric"] = counts.get("metric", 0) + 1
            if not abs(old - new) <= TOLERANCE * max(1.0, abs(old)) and old == old:
                raise ReplayDifference(f"metric {name}: {old:.12g} was recorded, {new:.12g} is computed now")


def _comparable(metrics: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in metrics.items() if not name.startswith(UNSEEN))
