"""Strategies with one fault each. Processes that a check starts import them from here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_core import OptimizerProvider, SharedBase, Trainable
from rlhf_core.errors import UsageError
from rlhf_core.strategy.torch import TorchStrategy, TorchTrainable


class AveragingTrainable(TorchTrainable):
    def backward(self, loss: Tensor) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        super().backward(loss)

    def step(self) -> dict[str, float]:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.calls * 1e4  # past AdamW's scale invariance: its epsilon is felt
        self.calls = 0
        return super().step()


class ForgetfulTrainable(TorchTrainable):
    def load(self, folder: str) -> None: ...


class LazyTrainable(TorchTrainable):
    def step(self) -> dict[str, float]:
        return {"grad_norm": 0.0, "lr": 0.0}


class SleepwalkingTrainable(TorchTrainable):
    def offload(self) -> None:
        with torch.no_grad():
            self.module.model.get_input_embeddings().weight.add_(0.1)


class BuildTimeTrainable(TorchTrainable):
    """Gives parameters as they were when the module was built."""

    def __init__(self, module: Any, *rest: Any) -> None:
        super().__init__(module, *rest)
        self.first = {id(parameter): parameter.detach().clone() for parameter in module.parameters()}

    def full(self, parameter: Tensor) -> Tensor:
        return self.first.get(id(parameter), parameter.detach())


class EagerAverageTrainable(TorchTrainable):
    """Gives the weights where their average is asked for."""

    def full(self, parameter: Tensor) -> Tensor:
        named = self.module.average.by_name() if self.module.average is not None else {}  # type: ignore[union-attr]
        names = [name for name, average in named.items() if average is parameter]  # type: ignore[operator, union-attr]
        return self.module.get_parameter(names[0]).detach() if names else parameter.detach()


class UnmergedTrainable(TorchTrainable):
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.model.named_parameters()  # type: ignore[operator, union-attr]


class StaleTrainable(TorchTrainable):
    """Gives the weights that it was built with."""

    def __init__(self, module: Any, *rest: Any) -> None:
        super().__init__(module, *rest)
        self.first = copy.deepcopy(dict(module.hf_weights()))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.first.items()


class DeafTrainable(TorchTrainable):
    """Takes no weights from elsewhere."""

    def assign(self, parameter: Tensor, whole: Tensor) -> None: ...


class HalfTrainable(TorchTrainable):
    """Shows a sampler half of the head."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        weight = self.module.causal_lm.get_output_embeddings().weight  # type: ignore[operator, union-attr]
        whole = weight.detach().clone()
        weight.data[: len(weight) // 2] = 0
        yield
        weight.data.copy_(whole)


class SharingTrainable(TorchTrainable):
    """Lends its base with the adapters on it."""

    def shared_base(self) -> SharedBase:
        return Adapted(self)


class Adapted(SharedBase):
    def forward(self, batch: Any, wants: frozenset[str]) -> dict[str, Tensor]:
        return self.base_owner.forward(batch, wants)


class AverageLosingTrainable(TorchTrainable):
    """Leaves the average out of what it restores."""

    def load(self, folder: str) -> None:
        average: Any = self.module.average
        kept = {name: tensor.clone() for name, tensor in average.by_name().items()} if average is not None else {}
        super().load(folder)
        for name, tensor in kept.items():
            average.by_name()[name].copy_(tensor)


class LonelyTrainable(TorchTrainable):
    """Does not add the gradients of other ranks; one process by itself sees nothing of it."""

    def _sum_gradients(self) -> None: ...


class RefusingTrainable(TorchTrainable):
    """Keeps no average, and says so in time."""

    def __init__(self, module: Any, *rest: Any) -> None:
        if module.average is not None:
            raise UsageError("this strategy keeps no average; leave out ema")
        super().__init__(module, *rest)


@dataclass(frozen=True)
class Built(TorchStrategy):
    """Builds a broken trainable."""

    which: str = "AveragingTrainable"
    """its class"""

    def __call__(self, build: Callable[[], Any], optim: OptimizerProvider | None, total_steps: int) -> Trainable:  # type: ignore[override]
        trainable: type[TorchTrainable] = globals()[self.which]
        return trainable(build(), optim, total_steps, torch.device("cpu"))
