"""SPIN against its equation in float64, and as a run: its opponent, its export, a resume, and two ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_algorithm_spin.algorithm import SPIN, SPINLoss
from rlhf_core import OptionError, Registry, Run, RunView, hookimpl
from rlhf_core.testing import check_algorithm, check_loss, tiny_extras, tiny_outputs, tiny_rollouts, tiny_run

MODEL = "tiny:hidden=16,layers=1"
MEASURED = ("time/", "speed/", "memory/")


def options(data: Path, **others: Any) -> dict[str, Any]:
    small = {
        "model": MODEL,
        "data": {"use": "json", "path": str(data), "completion_key": "answer"},
        "sampling": {"n": 2, "max_new_tokens": 5},
        "actor": {"optim": {"lr": 1e-2}},
        "opponent": {"track": {"every": 2}},
        "batch_size": 2,
    }
    return small | others


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Question {i}?", "answer": "yes" * (i % 3 + 1)}) + "\n" for i in range(16))
    )
    return path


def rows(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in lines]


def test_the_loss_is_equation_4_7() -> None:
    rollouts = tiny_rollouts()
    rollouts = rollouts.with_extras(**tiny_extras(SPINLoss.needs, rollouts))
    outputs = tiny_outputs({"logprobs_NT"}, rollouts)
    ratio = (outputs["logprobs_NT"].detach() - rollouts["opponent.logprobs_NT"]).double()
    r = [float(row[mask].sum()) for row, mask in zip(ratio, rollouts.mask_NT)]
    for pair, value in enumerate(SPINLoss(0.5)(outputs, rollouts).values.tolist()):
        assert value == pytest.approx(math.log(1 + math.exp(-0.5 * (r[2 * pair] - r[2 * pair + 1]))), abs=1e-6)


def test_providers_keep_their_contracts() -> None:
    plan = check_algorithm(SPIN())
    assert plan.sources == ("data", "opponent") and plan.tracking_roles == ("opponent",)
    check_loss(SPINLoss())
    with pytest.raises(OptionError, match="must be above 0, not 0"):
        SPIN(lam=0)


class Watcher:
    """In each step: the weights of both roles before the update, and the pairs that were trained on."""

    def __init__(self) -> None:
        self.weights: list[dict[str, dict[str, torch.Tensor]]] = []
        self.pairs: list[Any] = []

    def look(self, run: RunView) -> None:
        roles = ("actor", "opponent")
        self.weights.append({name: {k: v.clone() for k, v in run.roles[name].weights()} for name in roles})

    @hookimpl
    def rlhf_run_start(self, run: RunView) -> None:
        self.look(run)

    @hookimpl
    def rlhf_step_end(self, run: RunView) -> None:
        (batch,) = run.samples.values()
        self.pairs.append(batch)
        self.look(run)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Run, Watcher]:
    registry, watcher = Registry(), Watcher()
    registry.register(watcher, "watcher")
    run = tiny_run(tmp_path_factory.mktemp("straight") / "run", SPIN(), registry, **options(data, steps=5))
    run.train()
    return run, watcher


def logprob(model: Any, batch: Any, i: int) -> float:
    """The log-probability of a completion, in float64."""
    prompt = batch.prompt_NL[i, : batch.prompt_lengths_N[i]]
    completion = batch.tokens_NT[i, : batch.lengths_N[i]]
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, completion[:, None])[batch.mask_NT[i, : len(completion)]].sum())


def test_a_run_trains_on_the_equation(straight: tuple[Run, Watcher]) -> None:
    """The independent source: transformers, in float64, with the weights of both roles before each update."""
    from transformers import AutoModelForCausalLM

    run, watcher = straight
    models = [AutoModelForCausalLM.from_pretrained(run.output / "model").double() for _ in range(2)]
    for row, batch, weights in zip(rows(run.output), watcher.pairs, watcher.weights, strict=False):
        for model, role in zip(models, ("actor", "opponent"), strict=True):
            model.load_state_dict(weights[role], strict=False)
        with torch.no_grad():
            r = [logprob(models[0], batch, i) - logprob(models[1], batch, i) for i in range(len(batch))]
        losses = [math.log(1 + math.exp(-0.1 * (r[i] - r[i + 1]))) for i in range(0, len(r), 2)]
        assert row["loss/actor"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert rows(run.output)[0]["loss/actor"] == pytest.approx(math.log(2)) == rows(run.output)[2]["loss/actor"]
    assert rows(run.output)[1]["loss/actor"] < math.log(2) - 1e-3


def test_pairs_are_a_demonstration_and_a_sample_of_its_prompt(straight: tuple[Run, Watcher]) -> None:
    _, watcher = straight
    for batch in watcher.pairs:
        assert len(batch) == 2 * 2 * 2, "prompts, samples of each, and rows of a pair"
        assert batch["joined_N"].tolist() == [0, 1] * 4
        assert all(text.startswith("yes") for text in batch.texts[0::2])
        assert batch.prompts[0::2] == batch.prompts[1::2] and len(set(batch.prompts)) == 2


def test_the_opponent_is_the_policy_of_every_second_step(straight: tuple[Run, Watcher]) -> None:
    _, watcher = straight
    for step, weights in enumerate(watcher.weights):
        then = watcher.weights[step // 2 * 2]["actor"]
        assert all(torch.equal(weights["opponent"][name], tensor) for name, tensor in then.items()), (
            f"after step {step}"
        )


def test_output_model_is_the_policy(straight: tuple[Run, Watcher]) -> None:
    from transformers import AutoModelForCausalLM

    run, watcher = straight
    exported = AutoModelForCausalLM.from_pretrained(run.output / "model").state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in watcher.weights[-1]["actor"].items())
    assert not all(torch.equal(exported[name], tensor) for name, tensor in watcher.weights[-1]["opponent"].items())


def test_a_resumed_run_has_the_numbers_of_a_straight_one(
    straight: tuple[Run, Watcher], data: Path, tmp_path: Path
) -> None:
    """It stops after step 3, when the opponent is a step behind the policy."""
    run, _ = straight
    tiny_run(tmp_path / "run", SPIN(), **options(data, steps=3)).train()
    tiny_run(tmp_path / "run", SPIN(), **options(data, steps=5, resume=True)).train()
    assert rows(tmp_path / "run") == rows(run.output)
    files = [output / "model" / "model.safetensors" for output in (tmp_path / "run", run.output)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_ranks_have_the_numbers_of_one(straight: tuple[Run, Watcher], data: Path, tmp_path: Path) -> None:
    run, _ = straight
    words = (
        f"spin -p rlhf_algorithm_spin.plugin --model {MODEL} --data.path {data} --data.completion-key answer --steps 5"
    )
    words += " --sampling.n 2 --sampling.max-new-tokens 5 --actor.optim.lr 1e-2 --opponent.track.every 2 --batch-size 2"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "rlhf_core", *words.split(), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(run.output), rows(tmp_path / "run"), strict=True):
        names = [name for name in one if name not in ("padding", "actor/accuracy")]  # of margins that are rounding
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-4)
