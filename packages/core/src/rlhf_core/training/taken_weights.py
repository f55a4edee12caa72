"""Weights that a role takes from another one, and their place in a checkpoint.

They come by their Hugging Face names, as a whole or in parts, and every rank writes its share of each. Strategies do not know:
`Trainable.full` and `Trainable.assign` are all that is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.tensor_tree import read_tree, write_tree

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.roles import Trainable

__all__ = ["TakenWeights", "read_weights", "snapshot_weights"]

FILE = "weights.safetensors"
"""The file of a tracking role in its folder of a checkpoint."""


class TakenWeights:
    """The weights of `trainable` that have been taken from another role.

    Args:
        role: the name of the role that takes them.
        trainable: its model under a strategy.
        module: its `RoleModule`.

    Raises:
        UsageError: the model has adapters.
    """

    def __init__(self, role: str, trainable: Trainable, module: Any) -> None:
        self.role = role
        self.trainable = trainable
        self._own: dict[str, Tensor] = module.hf_parameters()
        self._names: set[str] = set()
        """those that have been taken"""
        self._heads = len(module.heads)
        if module.adapters is not None:
            raise UsageError(f"the {role} takes the weights of another role, but has adapters; train it without lora")

    def add(self, weights: Iterable[tuple[str, Tensor]], decay: float) -> None:
        """Write `weights`, or with `decay` the average of those at hand and these, in float32."""
        with torch.no_grad():
            for name, tensor in weights:
                own = self._own.get(name)
                if own is None:
                    raise self._misfit(name, "is missing here")
                shape = (
                    self.trainable.full(own) if self.trainable.sharded else own
                ).shape  # a share has another one, or none
                if shape != tensor.shape:
                    raise self._misfit(name, f"has the shape {tuple(tensor.shape)} there and {tuple(shape)} here")
                if decay and tensor.is_floating_point():
                    mine = self.trainable.full(own).float()
                    tensor = mine.lerp(tensor.to(mine.device).float(), 1 - decay)
                self.trainable.assign(own, tensor)
                self._names.add(name)

    def check_complete(self) -> None:
        """Check that nothing of the model was left out."""
        if self._heads:
            raise UsageError(
                f"the {self.role} takes the weights of another role, but its head is not part of its model; choose "
                "a model that transformers supports as a sequence classifier"
            )
        missing = sorted(self._own.keys() - self._names)
        if missing:
            raise self._misfit(missing[0], "is missing there")

    def _misfit(self, name: str, reason: str) -> UsageError:
        return UsageError(
            f"the {self.role} cannot take the weights of another role: {name} {reason}; give both models of the "
            f"same architecture ({run_option(f'{self.role}.model')})"
        )


def snapshot_weights(weights: Iterator[tuple[str, Tensor]], leads: bool) -> Callable[[str], None]:
    """Copy whole weights to CPU memory, and return what writes them to a folder; only the leader's copy is written.

    Every rank calls it, since sharded weights are gathered.
    """
    copies = {name: tensor.detach().cpu().clone() for name, tensor in weights if leads}
    return partial(_write, copies if leads else None)


def _write(weights: dict[str, Tensor] | None, folder: str) -> None:
    if weights is not None:
        write_tree(Path(folder) / FILE, weights)


def read_weights(folder: str, role: str) -> Iterable[tuple[str, Tensor]]:
    """Return what was written.

    Raises:
        UsageError: when the checkpoint was written, the role tracked no other one.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise UsageError(
            f"{folder} has no weights of the {role}, since it tracked no role in that run; leave out "
            f"{run_option(f'{role}.track.of')}"
        )
    weights: dict[str, Tensor] = read_tree(path)
    return weights.items()
