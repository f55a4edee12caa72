"""Optimizers of roles: chosen by name, observing a step, evaluating it again, and resumed to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rlhf_core import AdamW, Batch, ContractError, OptimizerProvider, Outputs, Providers, Registry, UsageError, hookimpl
from rlhf_core.contract.distributed import World
from rlhf_core.strategy.fake import FakeStrategy
from rlhf_core.testing import check_optimizer, tiny_rollouts, tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.observation import Observation
from rlhf_core.training.optimizer import Schedule, load_optimizer, make_optimizer

Named = Iterable[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class SGD(OptimizerProvider):
    """Plain gradient descent."""

    lr: float = 0.1
    """step size"""
    max_grad_norm: float = 0.0
    """no clipping"""

    def __call__(self, named_parameters: Named, total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for _, parameter in named_parameters], lr=self.lr)


class _Extra(torch.optim.SGD):
    """Korpelevich's extragradient step: look ahead by one step, and descend from the start with the gradient there."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        loss = closure()
        before = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]
        super().step()
        closure()
        with torch.no_grad():
            for parameter, start in zip(self.param_groups[0]["params"], before, strict=True):
                parameter.copy_(start)
        super().step()
        return loss


@dataclass(frozen=True)
class Extragradient(SGD):
    """Extragradient descent."""

    closure: ClassVar[bool] = True

    def __call__(self, named_parameters: Named, total_steps: int) -> torch.optim.Optimizer:
        return _Extra([parameter for _, parameter in named_parameters], lr=self.lr)


@dataclass(frozen=True)
class Observing(SGD):
    """Gradient descent that writes down what it receives, in its state."""

    observes: ClassVar[bool] = True
    outputs: ClassVar[frozenset[str]] = frozenset({"entropy_NT"})

    def observe(self, batch: Batch, outputs: Outputs, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        (loss_NT,) = values.values()
        assert loss_NT.requires_grad, "observed before the backward pass, with the graph"
        mask_NT = batch.mask_NT
        return {
            "tokens": mask_NT.sum().double(),
            "entropy": outputs["entropy_NT"][mask_NT].double().sum(),
            "loss": loss_NT[mask_NT].double().sum(),
        }

    def receive(self, optimizer: Any, sums: Mapping[str, Tensor]) -> None:
        first = optimizer.param_groups[0]["params"][0]
        optimizer.state[first]["sums"] = torch.stack([sums[name] for name in ("tokens", "entropy", "loss")])


class _Forgetful(torch.optim.SGD):
    """Adds the gradient before this one, which it holds outside its state."""

    last: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        gradient = self.param_groups[0]["params"][0].grad
        now = gradient.clone()
        if self.last is not None:
            gradient += self.last
        self.last = now
        return super().step(closure)


@dataclass(frozen=True)
class Keeps(SGD):
    """Momentum that no checkpoint holds."""

    def __call__(self, named_parameters: Named, total_steps: int) -> torch.optim.Optimizer:
        return _Forgetful([parameter for _, parameter in named_parameters], lr=self.lr)


@dataclass(frozen=True)
class Sloppy(SGD):
    """One that forgets a parameter."""

    def __call__(self, named_parameters: Named, total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for _, parameter in named_parameters][1:], lr=self.lr)


class Plugin:
    @hookimpl
    def rlhf_optimizer(self) -> Providers:
        return {"sgd": SGD}


def role(optimizer: OptimizerProvider, **options: Any) -> LocalRole:
    return LocalRole(tiny_run("unused", actor={"optim": optimizer}, **options).plan, "actor")


def credited() -> Batch:
    batch = tiny_rollouts()
    return batch.with_extras(advantages_NT=torch.where(batch.mask_NT, torch.linspace(-1, 1, len(batch))[:, None], 0.0))


def weights(of: LocalRole) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in of.module.parameters()])


def train(of: LocalRole) -> None:
    of.train({"actor": credited()})


def test_rlhf_optimizer_brings_optimizers_that_roles_choose_by_name(tmp_path: Path) -> None:
    registry = Registry(autoload=False)
    registry.register(Plugin(), "sgd-plugin")
    run = tiny_run(tmp_path, registry=registry, actor={"optim": {"use": "sgd", "lr": 0.5}})
    with run.open():
        actor: Any = run.roles["actor"]
        assert type(actor.trainable.optimizer) is torch.optim.SGD
    assert 'use = "sgd"' in (tmp_path / "config.toml").read_text()


def test_a_step_follows_the_optimizer_and_not_adamw() -> None:
    actor, batch = role(SGD(lr=0.5)), credited()
    before = weights(actor)
    outputs = actor.trainable.forward(batch, frozenset({"logprobs_NT"}))
    loss = -(batch["advantages_NT"] * outputs["logprobs_NT"])[batch.mask_NT].mean()
    gradients = torch.autograd.grad(loss, list(actor.module.parameters()), allow_unused=True)
    flat = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(actor.module.parameters(), gradients, strict=True)
        ]
    )
    train(actor)
    assert torch.allclose(weights(actor), before - 0.5 * flat, atol=1e-6)
    assert (weights(actor) - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    "optimizer", [AdamW(lr=1e-2), SGD(), Extragradient(lr=0.05), Observing()], ids=lambda o: type(o).__name__
)
def test_the_authors_check_passes_for_optimizers_that_keep_the_contract(optimizer: OptimizerProvider) -> None:
    check_optimizer(optimizer)


def test_the_authors_check_finds_state_that_no_checkpoint_holds() -> None:
    with pytest.raises(AssertionError, match="Keeps: after a step after a resume"):
        check_optimizer(Keeps())


def test_a_closure_evaluates_the_whole_step_at_the_weights_of_now() -> None:
    """w' = w - lr g(w - lr g(w)), where the inner and outer gradients come from plain gradient descent."""
    lr = 0.05
    start = weights(role(SGD(lr=lr)))
    twice = role(SGD(lr=lr))
    train(twice)
    ahead = weights(twice)
    train(twice)
    expected = start - (ahead - weights(twice))
    for tokens in (8192, 1):
        extra = role(Extragradient(lr=lr), micro_tokens=tokens)
        train(extra)
        assert torch.allclose(weights(extra), expected, atol=1e-6)
    assert not torch.allclose(ahead, expected, atol=1e-6), "one step of gradient descent is another point"


@pytest.mark.parametrize("tokens", [8192, 40, 1])
def test_an_optimizer_receives_the_sums_over_all_micro_batches(tokens: int) -> None:
    actor, batch = role(Observing(), micro_tokens=tokens), credited()
    found = actor.infer(batch, frozenset({"logprobs_NT", "entropy_NT"}))
    mask_NT = batch.mask_NT
    losses = -(batch["advantages_NT"] * found["logprobs_NT"])[mask_NT].double()
    expected = torch.stack([mask_NT.sum().double(), found["entropy_NT"][mask_NT].double().sum(), losses.sum()])
    train(actor)
    optimizer: Any = actor.trainable.optimizer  # type: ignore[attr-defined]
    sums = optimizer.state[optimizer.param_groups[0]["params"][0]]["sums"]
    assert torch.allclose(sums, expected, rtol=1e-5)


def test_a_rank_that_has_run_out_of_micro_batches_adds_nothing() -> None:
    class Pair(World):
        size = 2

        def sum(self, tensor: Tensor) -> Tensor:
            return tensor + 7.0

    batch = credited()
    outputs = {name: torch.zeros(batch.mask_NT.shape, requires_grad=True) for name in ("logprobs_NT", "entropy_NT")}
    values = {"loss": outputs["logprobs_NT"] - 1}
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for lives, expected in (([True, False], float(batch.mask_NT.sum())), ([False, False], 0.0)):
        seen = Observation(Observing())
        for live in lives:
            seen.add(batch, outputs, values, live)
        seen.hand_over(optimizer, Pair())
        tokens = optimizer.state[optimizer.param_groups[0]["params"][0]]["sums"][0]
        assert float(tokens) == expected + 7.0, "and the other rank's sum is in it"


def test_a_group_keeps_its_own_peak_learning_rate_under_the_schedule() -> None:
    slow, fast = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.2}, {"params": [fast], "lr": 2.0}], lr=0.2)
    schedule = Schedule(optimizer, SGD(lr=0.2, schedule="linear"), 5)
    assert schedule.set(2) == pytest.approx(0.12)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.12, 1.2])


def test_float64_state_of_a_float32_weight_is_restored_to_the_bit() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    saved, fresh = (torch.optim.SGD([weight], lr=0.1) for _ in range(2))
    saved.state[weight]["curvature"] = torch.tensor([1 / 3, 1e-9], dtype=torch.float64)
    load_optimizer(fresh, saved.state_dict())
    assert fresh.state[weight]["curvature"].dtype == torch.float64
    assert torch.equal(fresh.state[weight]["curvature"], saved.state[weight]["curvature"])


def test_an_optimizer_that_forgets_a_parameter_is_named() -> None:
    with pytest.raises(
        ContractError, match=r"optimizer Sloppy of .* omits weight; put each of the 2 trained parameters"
    ):
        make_optimizer(torch.nn.Linear(2, 2), Sloppy(), 1)


def test_a_strategy_that_only_takes_gradients_refuses_more_in_one_line() -> None:
    for optimizer in (Observing(), Extragradient()):
        with pytest.raises(
            UsageError, match="needs more than the gradient of a step, which strategy fake does not provide"
        ) as caught:
            role(optimizer, strategy=FakeStrategy())
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="evaluates the loss several times per step, which float16 does not support"):
        LocalRole(tiny_run("unused", actor={"optim": Extragradient(), "dtype": "float16"}).plan, "actor")


@dataclass(frozen=True)
class RowReading(Observing):
    """Gradient descent that takes rows, not sums."""

    def observe(self, batch: Batch, outputs: Outputs, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"length_N": batch.lengths_N, "rows": torch.tensor(float(len(batch)))}

    def receive(self, optimizer: Any, sums: Mapping[str, Tensor]) -> None:
        first = optimizer.param_groups[0]["params"][0]
        optimizer.state[first] |= dict(sums)


@dataclass(frozen=True)
class RowLosing(Observing):
    """Gradient descent that takes too few rows."""

    def observe(self, batch: Batch, outputs: Outputs, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"length_N": batch.lengths_N[1:]}


@pytest.mark.parametrize("micro_tokens", [1, 4096])
def test_rows_that_an_optimizer_observes_come_in_the_order_of_the_data(micro_tokens: int) -> None:
    of = role(RowReading(), micro_tokens=micro_tokens)
    batch = credited()
    numbers = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3])
    of.train({"actor": batch.with_extras(uids_N=numbers)})
    found = of.trainable.optimizer.state[of.trainable.optimizer.param_groups[0]["params"][0]]  # type: ignore[attr-defined]
    assert found["length_N"].tolist() == [*batch.lengths_N[4:].tolist(), *batch.lengths_N[:4].tolist()]
    assert float(found["rows"]) == 8


def test_rows_of_another_number_than_the_micro_batch_are_refused() -> None:
    with pytest.raises(ContractError, match=r"observe\(\) returns 'length_N' of shape \(7,\) for 8 rows"):
        train(role(RowLosing()))
