"""Record steps with `--record-every`, so that `rlhf-run replay` can compute their reward, credit and loss again.

    OUTPUT/record/step-N.safetensors
        batches   the completions, or rows of data, that the step was about, with what was at hand before credit
        rewards   what they earned, after shaping
        tapes     every forward pass of every role, and the values of the losses
        credited  the extras of the batches that were trained on
        before    the coefficient of KL, moments of rewards, and states of reward and advantages, before the step
        metrics   of the step

A step takes a few numbers per token and output, and no weights; with `logits_NT` and the like it takes what these take.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch, Rollouts, StepInfo
from rlhf_core.contract.kept_sets import KeptSets, Truncation
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError, run_option
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.tape import Tape
from rlhf_core.util.atomic_files import force
from rlhf_core.util.messages import log
from rlhf_core.util.tensor_tree import plain_tree, write_tree

if TYPE_CHECKING:
    from rlhf_core.run.iteration import Iteration
    from rlhf_core.run.run import Run

__all__ = ["FOLDER", "Recorder", "batch_of", "rewards_of", "step_file"]

FOLDER = "record"
"""Folder in OUTPUT."""

REMEMBERING = ("reward", "advantage")
"""Kinds whose engines' states are kept."""


class Recorder:
    """Records steps of a run.

    Args:
        run: the run; nothing is read of it before its first step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.kept: dict[str, Any] = {}
        """record of the current step; empty in steps that are not recorded"""

    def begin(self, iteration: Iteration) -> None:
        """Let the roles write down what they compute from here on, in a step that is recorded.

        Raises:
            UsageError: the roles are not in this process alone.
        """
        every = self.run.config.record_every
        if not every or iteration.step % every:
            return
        states = self.run.engines.state_dict(clone=True)
        self.kept = {
            "kl_coef": self.run.kl_coef,
            "moments": {source: list(each.state()) for source, each in iteration.moments.items()},
            "states": {place: state for place, state in states.items() if place.partition(".")[0] in REMEMBERING},
        }
        if self.run.config.ahead:
            ahead = run_option("ahead", self.run.config.ahead)
            raise UsageError(
                f"{run_option('record_every', every)} does not work with sampling ahead; leave out {ahead}"
            )
        for role in self.run.roles.values():
            if self.run.world.size > 1 or not isinstance(role, LocalRole):
                raise UsageError(
                    f"{run_option('record_every', every)} needs all roles in one process; leave it out, or start "
                    f"one process with {run_option('launcher', 'local')}"
                )
            on_cpu = all(parameter.device.type == "cpu" for parameter in role.module.parameters())
            role.forward_cache.tape = Tape(role.version, role.module.packs, on_cpu, role.trainable.keeps_graphs)

    def note(self, iteration: Iteration) -> None:
        """Keep the completions and rewards as they are before credit."""
        if self.kept:
            self.kept["batches"] = {name: _to_tree(batch) for name, batch in iteration.batches.items()}
            self.kept["rewards"] = {name: _to_tree(rewards) for name, rewards in iteration.rewards.items()}

    def finish(self, step: int, credited: Mapping[str, Batch], metrics: Mapping[str, float]) -> None:
        """Write the step down. One that holds what no file can is reported and left out."""
        if not self.kept:
            return
        kept, self.kept = self.kept, {}
        tapes = {}
        for name, role in self.run.roles.items():
            assert isinstance(role, LocalRole)
            tape, role.forward_cache.tape = role.forward_cache.tape, None
            if tape is not None:
                tapes[name] = {each.name: getattr(tape, each.name) for each in dataclasses.fields(tape)}
        kept |= {
            "tapes": tapes,
            "credited": {key: dict(batch.extras) for key, batch in credited.items()},
            "metrics": dict(metrics),
        }
        try:
            tree = plain_tree(kept)
        except TypeError as error:
            log.warning(f"step {step} is not recorded: {error}")
            return
        path = step_file(self.run.output, step)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        write_tree(temporary, tree)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        force(path.parent)


def step_file(output: Path, step: int) -> Path:
    """Return the file of a recorded step."""
    return output / FOLDER / f"step-{step}.safetensors"


def _to_tree(value: Batch | RewardOutput) -> dict[str, Any]:
    """Return a batch or rewards as plain values and tensors."""
    fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Batch):
        fields["kept_sets"] = [{"kind": type(each).__name__, **_fields(each)} for each in value.kept_sets]
        fields |= {"kind": type(value).__name__, "step": asdict(value.step), "world": None}
    return fields


def _fields(value: KeptSets | Truncation) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}


def batch_of(tree: Mapping[str, Any]) -> Batch:
    """Return the batch that `record` has as a tree."""
    fields = dict(tree)
    kinds: dict[str, Any] = {each.__name__: each for each in (Batch, Rollouts, KeptSets, Truncation)}
    kind = kinds[fields.pop("kind")]
    fields["kept_sets"] = [
        kinds[each["kind"]](**{name: value for name, value in each.items() if name != "kind"})
        for each in fields["kept_sets"]
    ]
    batch: Batch = kind(**{**fields, "step": StepInfo(**fields["step"])})
    return batch


def rewards_of(tree: Mapping[str, Any]) -> RewardOutput:
    """Return the rewards that `record` has as a tree."""
    return RewardOutput(**tree)
