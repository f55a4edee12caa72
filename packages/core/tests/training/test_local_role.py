"""The optimizer step: whatever is cut however, the gradient is that of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import KL, RunConfig, TrainedOptions
from rlhf_core.contract.providers import Algorithm, Loss
from rlhf_core.contract.results import LossTerms, Metric, Outputs, Reduction
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import ContractError
from rlhf_core.strategy.fake import FakeStrategy
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.optimizer_step import _to_batch_device
from rlhf_core.training.planner import make_plan


@dataclass(frozen=True)
class Square(Loss):
    """(logprob - target)^2 with a reduction of choice."""

    per: str = "token"
    target: float = 1.0
    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset()
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        values_NT = (outputs["logprobs_NT"] - self.target) ** 2
        return LossTerms(values_NT, Reduction(self.per, 4), {"seen": Metric.over(values_NT, batch.mask_NT)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ratio(Square):
    """exp(logprob - old): its gradient is one per token exactly when the ratio is one."""

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms((outputs["logprobs_NT"] - batch["old_logprobs_NT"]).exp(), Reduction("token"))


@dataclass(frozen=True)
class Given(Algorithm):
    terms: tuple[Term, ...]
    kl: KL = KL(coef=0.0)

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return self.terms


def role_of(*terms: Term, lr: float = 0.1, **options: object) -> LocalRole:
    roles = {"actor": TrainedOptions(optim=AdamW(lr=lr))}
    config = RunConfig(Given(terms), {"strategy": FakeStrategy()}, {}, roles, model="tiny", **options)  # type: ignore[arg-type]
    return LocalRole(make_plan(config), "actor")


LENGTHS = [5, 1, 3, 4, 2, 2]


def expected_gradient(per: str, batch: Batch) -> float:
    """d/dw of the reduced square at w = 0, from the definition, in plain Python."""
    slopes = [
        [2 * (-1 - int(token) % 7 - 1.0) for token in batch.tokens_NT[i, : LENGTHS[i]]] for i in range(len(LENGTHS))
    ]
    flat = [x for row in slopes for x in row]
    means = [sum(row) / len(row) for row in slopes]
    return {
        "token": sum(flat) / len(flat),
        "sequence": sum(means) / len(means),
        "constant": sum(flat) / (4 * len(slopes)),
        "sum": sum(flat),
    }[per]


@pytest.mark.parametrize("per", ["token", "sequence", "constant", "sum"])
@pytest.mark.parametrize("micro_tokens", [1, 9, 16, 10_000])
def test_the_micro_batch_budget_changes_no_gradient_and_no_loss(per: str, micro_tokens: int) -> None:
    batch = make_batch(LENGTHS)
    role = role_of(Term("actor", "data", Square(per)), micro_tokens=micro_tokens)
    metrics = role.train({"data": batch})
    assert float(role.trainable.w.detach()) == pytest.approx(-0.1 * expected_gradient(per, batch), rel=1e-5)
    assert metrics["grad_norm/actor"] == pytest.approx(abs(expected_gradient(per, batch)), rel=1e-5)
    squares = [(2 + int(t) % 7) ** 2 for i in range(6) for t in batch.tokens_NT[i, : LENGTHS[i]]]
    assert metrics["actor/seen"] == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_terms_of_one_role_are_weighted_and_summed_in_one_step() -> None:
    batch = make_batch(LENGTHS)
    role = role_of(Term("actor", "data", Square("token"), weight=0.5), Term("actor", "data", Square("sum"), weight=2.0))
    role.train({"data": batch})
    expected = 0.5 * expected_gradient("token", batch) + 2 * expected_gradient("sum", batch)
    assert float(role.trainable.w.detach()) == pytest.approx(-0.1 * expected, rel=1e-5)
    assert role.version == 1


def test_on_policy_old_log_probabilities_are_the_live_ones() -> None:
    """No forward pass computed them, the ratio is exactly one, and the gradient is that of the plain policy gradient."""
    role = role_of(Term("actor", "data", Ratio()))
    metrics = role.train({"data": make_batch(LENGTHS)})
    assert metrics["loss/actor"] == 1.0
    assert float(role.trainable.w.detach()) == pytest.approx(-0.1)


def test_epochs_and_minibatches_are_optimiser_steps() -> None:
    batch = make_batch(LENGTHS)
    role = role_of(Term("actor", "data", Square("token")), update_epochs=2, minibatches=3)
    role.train({"data": batch})
    assert role.version == role.trainable.steps_done == 6


def test_inference_puts_every_row_where_it_belongs() -> None:
    batch = make_batch(LENGTHS)
    role = role_of(Term("actor", "data", Square()), micro_tokens=9)
    found = role.infer(batch, frozenset({"logprobs_NT", "scores_N"}))["logprobs_NT"]
    assert torch.equal(found, (-1 - batch.tokens_NT % 7) * batch.mask_NT.float())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda outputs: outputs["logprobs_NT"].sum(), r"returned Tensor; a loss returns LossTerms"),
        (
            lambda outputs: LossTerms(outputs["logprobs_NT"].mean(), Reduction("token")),
            r"values of shape \(\); reduction 'token' needs",
        ),
        (lambda outputs: LossTerms(outputs["logprobs_NT"].detach(), Reduction("token")), r"without a gradient"),
        (lambda outputs: LossTerms(outputs["logprobs_NT"], "token"), r"asks for 'token'; write Reduction"),
        (
            lambda outputs: LossTerms(outputs["logprobs_NT"], Reduction("tokens")),  # type: ignore[arg-type]
            r"asks for Reduction\(per='tokens', .*; write .* one of token, sequence, sample, prompt, constant, sum$",
        ),
        (lambda outputs: LossTerms(outputs["logprobs_NT"], Reduction("constant")), r"the length must be above 0"),
        (lambda outputs: LossTerms(0.5, Reduction("token")), r"values that are a float, not a tensor"),
        (
            lambda outputs: LossTerms(outputs["logprobs_NT"], Reduction("token"), {"x": 3.0}),
            r"the metric 'x' must be a Metric of two scalars, .*, not 3.0$",
        ),
        (
            lambda outputs: LossTerms(
                outputs["logprobs_NT"], Reduction("token"), {"x": Metric(torch.ones(2), torch.ones(2))}
            ),
            r"the metric 'x' must be a Metric of two scalars",
        ),
    ],
)
def test_a_loss_that_breaks_the_contract_is_named(result: object, message: str) -> None:
    @dataclass(frozen=True)
    class Broken(Square):
        def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
            return result(outputs)  # type: ignore[operator, no-any-return]

    with pytest.raises(ContractError, match=rf"loss .*Broken.*{message}"):
        role_of(Term("actor", "data", Broken())).train({"data": make_batch(LENGTHS)})


def test_losses_find_outputs_of_an_accelerator_beside_their_rows() -> None:
    """A device that only pretends: operations between it and the CPU fail as on a real one."""
    with FakeTensorMode():
        tokens_NT, advantages_NT = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
        micro: Any = SimpleNamespace(tokens_NT=tokens_NT)
        logprobs_NT = torch.zeros(2, 3, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            logprobs_NT * advantages_NT
        values_NT = _to_batch_device(micro, {"logprobs_NT": logprobs_NT})["logprobs_NT"] * advantages_NT
    assert values_NT.device.type == "cpu"
