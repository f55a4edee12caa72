"""The memoryless optimizer on a whole model and on adapters: Hessian products against plain transformers, on any ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from head_runs import ROWS, head_of, options, train
from killed_child import train_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_algos.one_pass import conjugate_gradient
from rlhf_algos.one_pass.memoryless_step import MemorylessStep
from rlhf_core import Run, UsageError, make_config
from rlhf_core.testing import run_ranks

WHOLE: dict[str, Any] = {"freeze": []}
ADAPTERS = pytest.param(
    {"freeze": [], "lora": {"rank": 2}},
    id="adapters",
    marks=pytest.mark.skipif(find_spec("peft") is None, reason="adapters need peft"),
)
OPTIM = {"use": "omd_memoryless", "lr": 0.05, "damping_strategy": "constant", "damping": 2.0}


@pytest.fixture
def closures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Vectors and products of the first step of a run."""
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    step = MemorylessStep.step

    def record(self: MemorylessStep, closure: Any = None) -> Any:
        if not seen:
            generator = torch.Generator().manual_seed(0)
            with torch.enable_grad():
                for _ in range(2):
                    vectors = [torch.randn(p.shape, generator=generator) for p in self.param_groups[0]["params"]]
                    before = [p.grad.clone() for p in self.param_groups[0]["params"] if p.grad is not None]
                    seen.append((vectors, closure.product(vectors)))
                    after = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
                    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # gradients stay
        return step(self, closure)

    monkeypatch.setattr(MemorylessStep, "step", record)
    return seen


def plain_products(folder: Path, names: Sequence[str], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Hessian of the mean loss of all pairs times vectors: plain transformers, float64, eager, pair by pair."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, attn_implementation="eager")
    model = model.double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = dict(model.named_parameters())
    parameters = [named[name] for name in names]

    def score(text: str) -> Tensor:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return model.score(model.base_model(torch.tensor([ids]))[0][0, -1])[0]

    losses = [
        -torch.nn.functional.logsigmoid(score(r["prompt"] + r["chosen"]) - score(r["prompt"] + r["rejected"]))
        for r in ROWS
    ]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters, create_graph=True)
    along = sum((g * v.double()).sum() for g, v in zip(gradients, vectors, strict=True))
    return list(torch.autograd.grad(along, parameters))


@pytest.mark.parametrize(
    ("options_of_role", "micro_tokens"),
    [({}, 4096), ({}, 1), ({"attention": "eager"}, 4096), ({"gradient_checkpointing": True}, 4096)],
    ids=["sdpa", "micro-batches", "eager", "recomputed"],
)
def test_products_are_those_of_plain_transformers(
    options_of_role: dict[str, Any], micro_tokens: int, tmp_path: Path, closures
) -> None:
    start = tmp_path / "start"
    train(start, {"use": "sgd", "lr": 0.1}, steps=1)  # a model with a head, as the run begins with
    more = {"reward": WHOLE | options_of_role, "batch_size": 12, "model": str(start / "model")}
    config = make_config(**options(tmp_path / "run", OPTIM, micro_tokens=micro_tokens, **more))
    run = Run(config)
    run.train()
    names = [name.removeprefix("model.") for name, _ in trained_names(run)]
    for vectors, products in closures:
        expected = plain_products(start / "model", names, vectors)
        for name, found, wanted in zip(names, products, expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-5, msg=name)


def trained_names(run: Run, role: str = "reward") -> list[tuple[str, torch.nn.Parameter]]:
    """Return names and shapes of what a run trains, in order."""
    from rlhf_core.models.build import build_module

    return list(build_module(run.plan.roles[role]).named_parameters())


def test_products_are_symmetric(tmp_path: Path, closures) -> None:
    train(tmp_path / "run", OPTIM, reward=WHOLE)
    (u, Hu), (v, Hv) = closures

    def inner(one: list[Tensor], other: list[Tensor]) -> float:
        return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))

    assert inner(u, Hv) == pytest.approx(inner(v, Hu), rel=1e-3, abs=1e-5)
    assert abs(inner(u, Hv)) > 1e-4


def test_a_step_solves_the_damped_system_of_its_batch(tmp_path: Path, monkeypatch) -> None:
    moved: list[tuple[Tensor, Tensor]] = []
    step = MemorylessStep.step

    def record(self: MemorylessStep, closure: Any = None) -> Any:
        parameters = self.param_groups[0]["params"]
        before = [p.detach().clone() for p in parameters]
        g = torch.cat([p.grad.flatten() for p in parameters])
        sizes = [p.numel() for p in parameters]

        def apply(v: Tensor) -> Tensor:
            parts = [part.view(p.shape) for part, p in zip(v.split(sizes), parameters, strict=True)]
            with torch.enable_grad():
                return torch.cat([each.flatten() for each in closure.product(parts)]) + 2.0 * v

        expected = conjugate_gradient(apply, g, 3).x_D
        loss = step(self, closure)
        change = torch.cat([(p - b).flatten() for p, b in zip(parameters, before, strict=True)])
        moved.append((change / -0.05, expected))
        return loss

    monkeypatch.setattr(MemorylessStep, "step", record)
    train(tmp_path / "run", OPTIM, reward=WHOLE)
    assert len(moved) == 3
    for found, expected in moved:
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("reward", [pytest.param(WHOLE, id="whole"), ADAPTERS])
def test_whole_models_and_adapters_train_resume_and_load(reward: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "straight", OPTIM, reward=reward, steps=3)
    train(tmp_path / "stopped", OPTIM, reward=reward, steps=2, save_every=1)
    # The schedule is of the whole run, so that a constant one is needed where its length changes.
    Run(make_config(**options(tmp_path / "stopped", OPTIM, reward=reward, steps=3, resume=True))).train()
    one, other = ((tmp_path / name / "model" / file_of(reward)).read_bytes() for name in ("straight", "stopped"))
    assert one == other
    if reward is WHOLE:
        assert head_of(tmp_path / "straight").shape == (16,)


@pytest.mark.parametrize(
    "reward",
    [
        pytest.param({"freeze": ["body"]}, id="head"),
        pytest.param(WHOLE, id="whole"),
        ADAPTERS,
    ],
)
def test_two_ranks_equal_one_process(reward: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "one", OPTIM, reward=reward)
    ranks = run_ranks(2, train_ranks, options(tmp_path / "two", OPTIM, reward=reward))
    assert all(rank.code == 0 for rank in ranks), ranks
    one, other = (load_file(tmp_path / name / "model" / file_of(reward)) for name in ("one", "two"))
    assert one.keys() == other.keys()
    for name, expected in one.items():
        torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)


def logged(output: Path) -> list[float]:
    """Return losses and norms of gradients by step, which differ if an earlier update did."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    return [row[name] for row in rows for name in ("loss/reward", "grad_norm/reward")]


def file_of(reward: dict[str, Any]) -> str:
    """Return the file of weights that a run leaves."""
    return "adapter_model.safetensors" if "lora" in reward else "model.safetensors"


def test_a_loss_without_second_derivative_is_refused_in_one_line(tmp_path: Path) -> None:
    actor = {"optim": OPTIM}
    made = options(tmp_path / "run", OPTIM)
    made.pop("reward")
    with pytest.raises(UsageError, match="optimizer of the actor needs second derivatives, .*chunk") as error:
        Run(make_config(**{**made, "algorithm": "dpo", "actor": actor})).train()
    assert "\n" not in str(error.value)


def test_without_chunks_products_of_a_policy_are_those_of_plain_transformers(tmp_path: Path, closures) -> None:
    def policy(output: Path, optim: dict[str, Any], **more: Any) -> Run:
        made = {**options(output, optim, **more), "algorithm": "dpo", "actor": {"optim": optim}, "chunk": 0}
        made.pop("reward")
        run = Run(make_config(**made))
        run.train()
        return run

    start = tmp_path / "start"
    policy(start, {"use": "sgd", "lr": 0.1}, steps=1)
    run = policy(tmp_path / "run", OPTIM, model=str(start / "model"), batch_size=12, steps=1)
    names = [name.removeprefix("model.") for name, _ in trained_names(run, "actor")]
    for vectors, products in closures:
        expected = plain_policy_products(start / "model", names, vectors)
        for name, found, wanted in zip(names, products, expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-5, msg=name)


def plain_policy_products(folder: Path, names: Sequence[str], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Hessian of the mean DPO loss, beta 0.1, where the policy is its reference: plain transformers, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = dict(model.named_parameters())
    parameters = [named[name] for name in names]

    def logprob(prompt: str, completion: str) -> Tensor:
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        after = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum()

    gaps = [logprob(r["prompt"], r["chosen"]) - logprob(r["prompt"], r["rejected"]) for r in ROWS]
    losses = [-torch.nn.functional.logsigmoid(0.1 * (gap - gap.detach())) for gap in gaps]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters, create_graph=True)
    along = sum((g * v.double()).sum() for g, v in zip(gradients, vectors, strict=True))
    return list(torch.autograd.grad(along, parameters))
