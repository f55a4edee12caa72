"""Distillation over the whole vocabulary: against float64 definitions, in chunks, through runs, and where it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_algos.loss.distill import DistillLoss
from rlhf_core import Run, make_config
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.providers import Launcher
from rlhf_core.contract.terms import Term
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.heads.compare import Comparison
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.module import RoleModule
from rlhf_core.testing import tiny_rollouts
from rlhf_core.training.local_role import _compare
from rlhf_core.training.planner import make_plan

KINDS = ("forward", "reverse", "js")


def definition(kind: str, student: list[float], teacher: list[float], beta: float, temperature: float) -> float:
    """The divergence of two rows of logits, term by term."""
    from math import exp, log

    def probabilities(logits: list[float]) -> list[float]:
        weights = [exp(z / temperature) for z in logits]
        return [w / sum(weights) for w in weights]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * log(x / y) for x, y in zip(a, b) if x > 0)

    q, p = probabilities(student), probabilities(teacher)
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q)]
    value = {"forward": kl(p, q), "reverse": kl(q, p), "js": beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]
    return temperature**2 * value


def logits(seed: int, rows: int = 5, V: int = 7) -> torch.Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 1.0), (0.9, 2.5)])
def test_every_divergence_is_its_definition_and_its_gradient_its_slope(
    kind: Any, beta: float, temperature: float
) -> None:
    loss = DistillLoss(kind, beta, temperature)
    student_mV, teacher_mV = logits(0).requires_grad_(), logits(1)
    expected = [definition(kind, s, t, beta, temperature) for s, t in zip(student_mV.tolist(), teacher_mV.tolist())]
    assert loss.compare(student_mV, teacher_mV).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda own: loss.compare(own, teacher_mV), (student_mV,))
    assert loss.compare(teacher_mV, teacher_mV).abs().max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_neither_can_say_change_nothing(kind: Any) -> None:
    """Two tokens of -inf, as padding of a vocabulary has; and rows that are certain."""
    student_mV, teacher_mV = logits(0), logits(1)
    longer = [torch.nn.functional.pad(x, (0, 2), value=-torch.inf).requires_grad_() for x in (student_mV, teacher_mV)]
    values = DistillLoss(kind).compare(*longer)
    torch.testing.assert_close(values, DistillLoss(kind).compare(student_mV, teacher_mV))
    (gradient,) = torch.autograd.grad(values.sum(), longer[0])
    assert torch.isfinite(gradient).all() and not gradient[:, -2:].any()
    sure = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    (gradient,) = torch.autograd.grad(DistillLoss(kind).compare(sure, -sure.detach()).sum(), sure)
    assert torch.isfinite(gradient).all()


def test_jensen_shannon_is_bounded_by_log_two() -> None:
    apart = torch.tensor([[50.0, -50.0]], dtype=torch.float64)
    assert float(DistillLoss("js").compare(apart, -apart)) == pytest.approx(torch.tensor(2.0).log().item())


# ----------------------------------------------------------------------------------------------------------------------
# through models
# ----------------------------------------------------------------------------------------------------------------------

LOSS = DistillLoss("js", temperature=2.0)
NAME = "teacher.js_NT"


def student_and_teacher(chunk: int, student: str = "tiny:hidden=16,layers=1") -> tuple[RoleModule, RoleModule]:
    """Two modules that have met."""
    terms = (("data", Term("actor", "data", LOSS)),)
    language = frozenset({"logprobs_NT"})
    own = build_module(RoleSpec("actor", TrainedOptions(model=student), language, terms), chunk=chunk)
    teacher = build_module(
        RoleSpec("teacher", ModelOptions(model="tiny:hidden=24,layers=2"), language), chunk=chunk, seed=1
    )
    own.comparisons[NAME] = Comparison(teacher, LOSS.compare)
    return own, teacher


def plain(own: RoleModule, teacher: RoleModule, inputs: Any) -> torch.Tensor:
    """Return the divergence from the models' whole logits."""
    own_MV, teacher_MV = (
        m.model(input_ids=inputs.ids_NS).logits.flatten(0, 1)[inputs.states_M] for m in (own, teacher)
    )
    values_M = LOSS.compare(own_MV, teacher_MV.detach())
    return torch.zeros(inputs.tokens_NT.numel()).index_put((inputs.slots_M,), values_M).view(inputs.tokens_NT.shape)


@pytest.mark.parametrize("chunk", [0, 1, 5, 1024])
def test_chunks_give_the_values_and_gradients_of_whole_logits(chunk: int) -> None:
    inputs = arrange_inputs(tiny_rollouts())
    own, teacher = student_and_teacher(chunk)
    gradients = []
    for values_NT in (own(inputs, frozenset({NAME}))[NAME], plain(own, teacher, inputs)):
        weights_NT = torch.linspace(0.5, 2, values_NT.numel()).view(values_NT.shape)
        gradients.append([values_NT, *torch.autograd.grad((weights_NT * values_NT).sum(), list(own.parameters()))])
    scale = max(float(each.detach().abs().max()) for each in gradients[1])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


class Largest(TorchDispatchMode):
    """The most elements of any tensor made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def test_the_logits_of_all_tokens_never_exist() -> None:
    """51 tokens of 4,000 words, 4 at a time: nothing is larger than the head's weight."""
    inputs = arrange_inputs(tiny_rollouts(prompts=3))
    own, other = (student_and_teacher(4, "tiny:hidden=16,layers=1,vocab=4000")[0] for _ in range(2))
    own.comparisons[NAME] = Comparison(other, LOSS.compare)
    with Largest() as largest:
        own(inputs, frozenset({NAME}))[NAME].sum().backward()
    assert len(inputs.targets_M) > 40
    assert largest.elements <= 16 * 4000


def test_of_vocabularies_padded_to_different_sizes_the_shorter_one_counts() -> None:
    inputs = arrange_inputs(tiny_rollouts())
    own, _ = student_and_teacher(5, "tiny:hidden=16,layers=1,vocab=300")
    own.causal_lm.get_output_embeddings().weight.data[259:] = 1e3  # would be said always, were it not left out
    values_NT = own(inputs, frozenset({NAME}))[NAME].detach()
    assert torch.isfinite(values_NT).all() and float(values_NT.max()) < 4 * 0.7


def test_two_functions_cannot_share_a_name() -> None:
    own, teacher = student_and_teacher(5)
    with pytest.raises(ContractError, match="rename one of them"):
        _compare(own, NAME, teacher, DistillLoss("js", beta=0.1))


# ----------------------------------------------------------------------------------------------------------------------
# runs
# ----------------------------------------------------------------------------------------------------------------------


def rows(folder: Path) -> dict[str, Any]:
    """The data provider's options for a file of demonstrations."""
    path = folder / "rows.jsonl"
    lines = [{"prompt": f"q{i}", "response": "abc"[: 1 + i % 3] * (1 + i % 5)} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"use": "json", "path": str(path), "encoding": {"template": "raw"}}


def losses(folder: Path, name: str, **options: Any) -> list[float]:
    small = {
        "model": "tiny:hidden=16,layers=1",
        "steps": 4,
        "batch_size": 4,
        "teacher": {"model": "tiny:hidden=24,layers=2"},
    }
    Run(make_config("distill", output=str(folder / name), data=rows(folder), **(small | options))).train()
    return [json.loads(line)["loss/actor"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_and_chunks_change_no_number_of_a_run(tmp_path: Path) -> None:
    expected = losses(tmp_path, "run")
    assert losses(tmp_path, "cut", micro_tokens=1, chunk=3) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the teacher, 'tiny:vocab=300', has another vocabulary .* pass teacher.model"
    ):
        losses(tmp_path, "run", teacher={"model": "tiny:vocab=300"})


class Elsewhere(Launcher):
    """A launcher that puts roles into processes of their own."""


def test_roles_in_different_processes_cannot_be_compared(tmp_path: Path) -> None:
    config = make_config("distill", model="tiny", data=rows(tmp_path))
    with pytest.raises(
        UsageError, match=r"DistillLoss compares whole distributions of actor and teacher, .* use launcher.*local"
    ):
        make_plan(replace(config, providers={**config.providers, "launcher": Elsewhere()}))


def test_on_the_student_s_own_samples_no_credit_is_assigned() -> None:
    plan = make_plan(make_config("on_policy_distill", model="tiny", loss="distill"))
    assert [(term.source, term.advantage) for term in plan.terms] == [("actor", None)]
    assert not plan.credits["actor"].needs and set(plan.roles) == {"actor", "teacher"}


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"beta": 0.0}, {"beta": 1.0}, {"temperature": 0.0}):
        with pytest.raises(UsageError, match="must"):
            DistillLoss(**wrong)  # type: ignore[arg-type]
