"""A strategy without a model: one number is trained, and every call takes the configured time.

For tests and costing of placement, queues, sync and recovery. The log-probability of a token is a fixed function of its id
plus the trained number, so losses have gradients, updates change outputs, and results can be worked out by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf_core.contract.distributed import TorchWorld, World
from rlhf_core.contract.memory import RoleMemory
from rlhf_core.contract.providers import Strategy
from rlhf_core.contract.roles import Trainable
from rlhf_core.lazy import torch
from rlhf_core.util.clock import sleep

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.memory import ModelSize
    from rlhf_core.contract.optimizers import OptimizerProvider

__all__ = ["FakeModel", "FakeStrategy", "FakeTrainable"]


@dataclass(frozen=True)
class FakeStrategy(Strategy):
    """Simulated strategy without a model: outputs follow from one trained number, and calls take stated times."""

    forward_seconds: float = 0.0
    """time of a forward pass per 1,000 tokens, in seconds"""
    step_seconds: float = 0.0
    """time of an optimizer step, in seconds"""
    gib: float = 0.0
    """memory that a role is reported to hold, in GiB"""

    def memory(self, whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
        """Return the stated memory, and nothing that a call adds."""
        return RoleMemory(weights=int(self.gib * 2**30))

    def __call__(
        self, build: Callable[[], nn.Module], optim: OptimizerProvider | None, total_steps: int
    ) -> FakeTrainable:
        return FakeTrainable(self, optim.lr if optim is not None else 0.0)


class FakeTrainable(Trainable):
    """`logprobs_NT = -(1 + token id mod 7) + w`, `entropy_NT = 1 + w`, `values_NT = w`, `scores_N = length * w`; SGD on w."""

    def __init__(self, options: FakeStrategy, lr: float) -> None:
        self.options = options
        self.lr = lr
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.world: World = TorchWorld() if distributed else World()
        self.module: Any = cast("Any", torch.nn.ParameterList([torch.zeros(())]))
        self.module.hf_parameters = lambda: {"w": self.w}
        self.module.own_weights = lambda *_: {}  # these are what an export reads
        self.module.adapters = self.module.average = self.module.vision = None
        self.module.frozen, self.module.packs = {}, False
        self.module.model = FakeModel(self)
        self.steps_done = 0

    @property
    def w(self) -> Tensor:
        """The one number."""
        parameter: Tensor
        (parameter,) = self.module.parameters()
        return parameter

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        sleep(self.options.forward_seconds * float((batch.prompt_lengths_N + batch.lengths_N).sum()) / 1000)
        real_NT = (torch.arange(batch.tokens_NT.shape[1]) < batch.lengths_N[:, None]).float()
        outputs = {
            "logprobs_NT": (self.w - 1 - batch.tokens_NT % 7) * real_NT,
            "full_logprobs_NT": (self.w - 1 - batch.tokens_NT % 7) * real_NT,
            "entropy_NT": (1 + self.w) * real_NT,
            "values_NT": self.w * real_NT,
            "scores_N": self.w * batch.lengths_N,
        }
        return {name: outputs[name] for name in names}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> dict[str, float]:
        sleep(self.options.step_seconds)
        gradient = self.world.sum(self.w.grad if self.w.grad is not None else torch.zeros(()))
        if gradient.isfinite():
            with torch.no_grad():
                self.w.sub_(self.lr * gradient)
            self.steps_done += 1
        self.w.grad = None
        return {"grad_norm": float(gradient.abs()), "lr": self.lr}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "w", self.w.detach()

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, folder: str) -> None:
        state = {"w": float(self.w.detach()), "steps_done": self.steps_done}
        (Path(folder) / "fake.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: str) -> None:
        state = json.loads((Path(folder) / "fake.json").read_text(encoding="utf-8"))
        with torch.no_grad():
            self.w.fill_(state["w"])
        self.steps_done = state["steps_done"]

    @property
    def held_bytes(self) -> int:
        """Return the stated bytes."""
        return int(self.options.gib * 2**30)

    def offload(self) -> None:
        """Nothing to move."""

    def reload(self) -> None:
        """Nothing to move."""


@dataclass
class FakeModel:
    """Export in place of a model: the file of a checkpoint."""

    trainable: FakeTrainable

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        self.trainable.save(str(folder))
