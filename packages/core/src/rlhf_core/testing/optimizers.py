"""A check of optimizers: a tiny actor is trained with one, resumed, and stepped whole and in pieces."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.tiny import tiny_rollouts, tiny_run

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.optimizers import OptimizerProvider

__all__ = ["check_optimizer"]


def check_optimizer(optimizer: OptimizerProvider, rtol: float = 1e-2) -> None:
    """It moves every trained weight by its learning rate, micro-batches change nothing, and a resumed role is equal to the bit.

    Adapters (LoRA) are trained too. A learning rate of 0 moves nothing: core's schedule may end there.

    Args:
        optimizer: the provider.
        rtol: how far two steps in micro-batches may end from two whole steps, as a share of the way (norms per parameter).

    Raises:
        AssertionError, ContractError: it is not so.
    """
    from rlhf_core.contract.optimizers import OptimizerProvider

    check_provider(optimizer)
    name = type(optimizer).__qualname__
    assert isinstance(optimizer, OptimizerProvider), f"{name} must subclass OptimizerProvider"
    batch = _with_advantages(tiny_rollouts())
    for lora in ({}, {"rank": 2}):
        start = _weights(_role(optimizer, lora))
        straight = _role(optimizer, lora)
        _step(straight, batch, 2)
        moved = _weights(straight)
        assert all(bool(each.isfinite().all()) for each in moved.values()), f"{name}: weights must stay finite"
        still = [key for key, value in moved.items() if torch.equal(value, start[key])]
        assert not still, f"{name} must train every parameter it is given; {still[0]} does not change"
        _check_resume(name, optimizer, lora, batch, moved)
        pieces = _role(optimizer, lora, micro_tokens=1)
        _step(pieces, batch, 2)
        for key, value in _weights(pieces).items():
            off = float((value - moved[key]).norm() / (moved[key] - start[key]).norm())
            assert off <= rtol, f"{name}: two steps in micro-batches move {key} elsewhere, {off:.2g} of the way off"
        idle = _role(replace(optimizer, lr=0.0), lora)
        if not any(group["lr"] for group in idle.trainable.optimizer.param_groups):
            _step(idle, batch, 1)
            _equal(name, "a step with learning rate 0", _weights(idle), start)


def _check_resume(
    name: str, optimizer: OptimizerProvider, lora: dict[str, Any], batch: Rollouts, straight: dict[str, Tensor]
) -> None:
    """One step, saved, restored into a fresh role, and one more: two steps."""
    first, second = _role(optimizer, lora), _role(optimizer, lora)
    _step(first, batch, 1)
    with tempfile.TemporaryDirectory() as folder:
        first.save(folder)
        second.load(folder)
    second.version = first.version
    _step(second, batch, 1)
    _equal(name, "a step after a resume (keep state in the optimizer's `state`)", _weights(second), straight)


def _role(optimizer: OptimizerProvider, lora: dict[str, Any], **options: Any) -> Any:
    """A tiny actor with this optimizer."""
    from rlhf_core.training.local_role import LocalRole

    actor = {"optim": optimizer, "lora": lora}
    return LocalRole(tiny_run("unused", actor=actor, **options).plan, "actor")


def _step(role: Any, batch: Rollouts, steps: int) -> None:
    for _ in range(steps):
        role.train({key: batch for key, _ in role.spec.terms})


def _weights(role: Any) -> dict[str, Tensor]:
    """A copy of everything that is trained."""
    named = role.module.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}


def _with_advantages(batch: Rollouts) -> Rollouts:
    """The batch with advantages between -1 and 1."""
    return batch.with_extras(advantages_NT=torch.where(batch.mask_NT, torch.linspace(-1, 1, len(batch))[:, None], 0.0))


def _equal(name: str, what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in found.items():
        off = float((value - expected[key]).abs().max())
        assert off == 0, f"{name}: after {what} {key} is {off:.2g} off; it must be equal to the bit"
