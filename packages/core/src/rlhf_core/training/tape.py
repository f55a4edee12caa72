"""Tapes of forward passes: the outputs of a role's model in a step, recorded and played back without a model.

A pass is known by its rows: what is asked for again gets the first pass on the same rows that has not been played. So a step
can be computed again from its completions, through the same code and to the same bits, while no weights are at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from rlhf_core.contract.distributed import World
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.roles import Trainable
from rlhf_core.errors import RunStopped, UsageError
from rlhf_core.lazy import torch
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.reduction import SharedNames
from rlhf_core.training.shared_forward import COLUMNS, ForwardCache
from rlhf_core.training.token_budget import TokenBudget

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch

__all__ = ["PlayedModel", "PlayedRole", "ReplayDifference", "Tape", "checksum"]


class ReplayDifference(RunStopped):
    """A replayed step is not the recorded one. The message names the first difference."""


@dataclass
class Tape:
    """The passes of one role in one step, and the values of its losses."""

    version: int = 0
    """optimizer steps of the role before the step"""
    packs: bool = True
    """True if the model read rows without padding"""
    on_cpu: bool = True
    """True if the model was on the CPU; both decide how batches were cut"""
    keeps_graphs: bool = True
    """`Trainable.keeps_graphs`, which decides how often rows were read"""
    passes: list[dict[str, Any]] = field(default_factory=list)
    """`rows`, a checksum of the rows that were read, and `outputs` by name"""
    losses: list[dict[str, Any]] = field(default_factory=list)
    """the values of each term by its name, one entry per micro-batch, with the `rows` they are of"""

    def add_pass(self, micro: Batch, outputs: Mapping[str, Tensor]) -> None:
        """Write down what a forward pass gave."""
        kept = {name: values.detach().to("cpu", copy=True) for name, values in outputs.items()}
        self.passes.append({"rows": checksum(micro), "outputs": kept})

    def add_losses(self, micro: Batch, values: Mapping[str, Tensor]) -> None:
        """Write down the values of the losses on a micro-batch."""
        kept = {name: each.detach().to("cpu", copy=True) for name, each in values.items()}
        self.losses.append({"rows": checksum(micro), "values": kept})

    def play(self, micro: Batch, names: frozenset[str], role: str) -> dict[str, Tensor]:
        """Return the outputs of the first pass on these rows that has not been played, and take it off the tape.

        Raises:
            ReplayDifference: no pass that is left read these rows.
        """
        wanted = checksum(micro)
        for place, each in enumerate(self.passes):
            if each["rows"] == wanted and names <= each["outputs"].keys():
                outputs: dict[str, Tensor] = self.passes.pop(place)["outputs"]
                return outputs
        raise ReplayDifference(
            f"the role {role} reads rows that are not in the recorded step: a micro-batch of {len(micro)} rows, "
            f"which starts with {micro.texts[0][:40]!r}; credit selects other rows, or batches are cut differently"
        )


def checksum(micro: Batch) -> str:
    """Return a checksum of the rows of a micro-batch, as a model reads them."""
    found = xxhash.xxh3_128()
    for name in COLUMNS:
        column = getattr(micro, name)
        found.update(repr(tuple(column.shape)).encode() + column.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class PlayedModel(Trainable):
    """A model that plays a tape.

    Args:
        tape: what it gives.
        name: the role, for messages.
    """

    world = World()

    def __init__(self, tape: Tape, name: str) -> None:
        self.tape, self.name = tape, name
        self.module: Any = _no_module(tape)
        self.keeps_graphs = tape.keeps_graphs

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """Play the next pass on these rows."""
        grad = torch.is_grad_enabled()  # a loss checks that its values have a gradient
        outputs = self.tape.play(batch, names, self.name)
        return {
            name: values.requires_grad_(grad) if values.is_floating_point() else values
            for name, values in outputs.items()
        }

    def backward(self, loss: Tensor) -> None:
        """Do nothing: there are no weights."""

    def step(self) -> Mapping[str, float]:
        """Return a gradient norm of zero, since nothing is updated."""
        return {"grad_norm": 0.0}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing."""
        return iter(())

    def gathered(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


class PlayedRole(LocalRole):
    """A role whose model plays a tape; all else is the code of a role that trains.

    Args:
        plan: the run.
        name: which of its roles.
        tape: the passes of the step.
    """

    def __init__(self, plan: Plan, name: str, tape: Tape) -> None:
        self.name, self.plan, self.spec, self.version = name, plan, plan.roles[name], tape.version
        options = self.spec.options
        if isinstance(options, TrainedOptions) and options.optim.closure:
            raise UsageError(
                f"the optimizer {type(options.optim).__qualname__} of {name} evaluates its loss several times per "
                "step, which a replay cannot distinguish; record a run with another optimizer"
            )
        self.forward_cache = ForwardCache()
        self.forward_cache.tape = self.replayed = Tape()
        self._names = SharedNames()
        self.trainable = PlayedModel(tape, name)
        self.world = self.trainable.world
        self.budget = TokenBudget(plan.config, name, self.world)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], decay: float = 0.0) -> None:
        """Take nothing: there are no weights."""


def _no_module(tape: Tape) -> nn.Module:
    """Return what is read of a role's module while there is none."""
    module: Any = torch.nn.Module()
    module.adapters = module.average = None
    module.frozen = module.vision = False
    module.packs = tape.packs
    module.elsewhere = torch.nn.Parameter(torch.empty(0, device="cpu" if tape.on_cpu else "meta"))
    return module  # type: ignore[no-any-return]
