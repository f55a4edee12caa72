"""The strategy `torch`: clipping, schedules and half precision do what their names say. Its contract is checked elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.contract.distributed import World
from rlhf_core.strategy.torch import TorchTrainable
from rlhf_core.testing.tiny import tiny_rollouts, tiny_run
from rlhf_core.training.local_role import LocalRole

OUTPUTS = frozenset({"logprobs_NT"})


def trainable(dtype: str = "float32", **optim: Any) -> TorchTrainable:
    """The actor of a run on the model `tiny`."""
    run = tiny_run("unused", actor={"dtype": dtype, "optim": {"lr": 1e-3} | optim})
    made = LocalRole(run.plan, "actor").trainable
    assert isinstance(made, TorchTrainable)
    return made


def loss_of(actor: TorchTrainable) -> Tensor:
    """Minus the mean log-probability of a small batch, with a gradient."""
    batch = tiny_rollouts()
    logprobs_NT = actor.forward(batch, OUTPUTS)["logprobs_NT"]
    return -(logprobs_NT * batch.mask_NT).sum() / batch.mask_NT.sum()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def stepped(actor: TorchTrainable) -> tuple[Tensor, Tensor, dict[str, float]]:
    """One step: the gradient as it is without strategy (its norm is checked against), AdamW's first moment, the metrics."""
    gradient = flat(torch.autograd.grad(loss_of(actor), list(actor.module.parameters())))
    actor.backward(loss_of(actor))
    metrics = actor.step()
    assert actor.optimizer is not None
    return gradient, flat(actor.optimizer.state[p]["exp_avg"] for p in actor.module.parameters()), metrics


@pytest.mark.parametrize("limit", [0.05, 0.0, 1e9])
def test_the_global_gradient_norm_is_clipped_and_the_one_before_is_reported(limit: float) -> None:
    """AdamW forgets the scale of its gradient; its first moment, (1 - beta) times the gradient, does not."""
    gradient, moment, metrics = stepped(trainable(max_grad_norm=limit, betas=(0.75, 0.95)))
    norm = float(gradient.norm())
    assert norm > 0.1
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    wanted = gradient * min(1.0, limit / norm) if limit else gradient
    assert float((moment / 0.25 - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_each_step_has_the_learning_rate_of_the_schedule() -> None:
    """Two steps in all: half of the peak while warming up, then the peak."""
    actor = trainable(warmup=1)
    assert [stepped(actor)[2]["lr"] for _ in range(2)] == pytest.approx([0.5e-3, 1e-3])


@pytest.mark.parametrize(("dtype", "resolution"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_is_near_float32_and_its_master_weights_are_float32(dtype: str, resolution: float) -> None:
    exact, half = trainable(), trainable(dtype)
    losses = [float(loss_of(each).detach()) for each in (exact, half)]
    assert losses[0] != losses[1], "it computes in half precision"
    assert losses[1] == pytest.approx(losses[0], rel=resolution)
    (gradient, moment, _), (_, half_moment, _) = stepped(exact), stepped(half)
    assert float((half_moment - moment).norm()) < 16 * resolution * float(moment.norm())
    assert {p.dtype for p in half.module.parameters()} == {torch.float32}
    assert float(gradient.norm()) > 0


def test_a_float16_step_that_overflows_is_skipped_and_the_scale_halved() -> None:
    actor = trainable("float16")
    before, scale = flat(actor.module.parameters()), actor.scaler.get_scale()
    actor.backward(loss_of(actor) * 1e38)
    actor.step()
    assert torch.equal(flat(actor.module.parameters()), before)
    assert actor.scaler.get_scale() == scale / 2
    stepped(actor)
    assert not torch.equal(flat(actor.module.parameters()), before)
    assert torch.isfinite(flat(actor.module.parameters())).all()


def test_a_rank_skips_the_step_when_another_one_overflowed() -> None:
    class Overflowing(World):
        """Two ranks, of which the other has infinite gradients."""

        size = 2

        def sum(self, tensor: Tensor) -> Tensor:
            return tensor + torch.inf

    actor = trainable("float16")
    actor.world = Overflowing()
    before = flat(actor.module.parameters())
    actor.backward(loss_of(actor))
    actor.step()
    assert torch.equal(flat(actor.module.parameters()), before)


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    """With a gradient of zero, AdamW's step is the decay alone."""
    actor = trainable(lr=0.5, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in actor.module.named_parameters()}
    actor.backward(0.0 * loss_of(actor))
    actor.step()
    for name, parameter in actor.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.dim() > 1 else 1.0))
    assert {p.dim() > 1 for p in actor.module.parameters()} == {True, False}
