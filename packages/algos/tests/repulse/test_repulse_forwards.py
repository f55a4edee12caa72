"""Counts of RePULSe's forward passes: no role reads a token twice with the same weights; several proposal updates per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_algos.algorithm.repulse import RePULSe
from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import KL
from rlhf_core.errors import UsageError
from rlhf_core.loop import collect, credit, update
from rlhf_core.strategy.torch import TorchTrainable


def run_of(output: Path, algorithm: RePULSe, **options: Any) -> Run:
    """Two prompts, three completions of two tokens each."""
    small: dict[str, Any] = {"model": "tiny:hidden=16,layers=1", "batch_size": 2, "steps": 1, "output": str(output)}
    small |= {"reward": {"use": "length", "target": 2}, "sampling": {"n": 3, "max_new_tokens": 2}}
    roles: dict[str, Any] = {"actor": {"optim": {"lr": 1e-2}}}
    if algorithm.proposal == "learned":
        roles["proposal"] = {"optim": {"lr": 1e-2}}
    return Run(make_config(algorithm, **(small | roles | options)))


@contextmanager
def counted(run: Run) -> Iterator[Counter[tuple[str, str, bool]]]:
    """(role, source, with a graph) of every forward pass."""
    seen: Counter[tuple[str, str, bool]] = Counter()
    sources: dict[str, str] = {}
    original = TorchTrainable.forward

    def forward(self: TorchTrainable, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        (name,) = (name for name, role in run.roles.items() if role.trainable is self)  # type: ignore[attr-defined]
        rows = sorted(map(str, batch.tokens_NT.tolist()))
        source = sources.get(str(rows), "part")
        seen[name, source, torch.is_grad_enabled()] += 1
        return original(self, batch, names)

    def learn(batches: Mapping[str, Batch]) -> None:
        sources.update({str(sorted(map(str, batch.tokens_NT.tolist()))): name for name, batch in batches.items()})

    seen.learn = learn  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTrainable, "forward", forward)
        yield seen


def one_step(run: Run) -> Counter[tuple[str, str, bool]]:
    """The forward passes of a step after sampling."""
    with counted(run) as seen:
        iteration = next(run.iterations(collect))
        seen.learn(iteration.batches)  # type: ignore[attr-defined]
        update(run, iteration, credit(run, iteration))
    return seen


@pytest.mark.parametrize("contrast", ["prefix", "sixo", "sixo_exact"])
def test_no_role_reads_the_same_tokens_twice_with_the_same_weights(contrast, tmp_path):
    with run_of(tmp_path, RePULSe(contrast=contrast, kl=KL(coef=0.1))).open() as run:
        seen = one_step(run)
    expected = {("actor", "actor", True), ("actor", "proposal", True), ("proposal", "proposal", True)}
    expected |= {("reference", "actor", False)}
    if contrast == "sixo_exact":
        expected |= {("proposal", "actor", True)}
    assert set(seen) == expected
    assert set(seen.values()) == {1}


def test_the_policy_s_own_samples_are_read_once_where_it_is_its_own_proposal(tmp_path):
    with run_of(tmp_path, RePULSe(proposal="base")).open() as run:
        seen = one_step(run)
    assert seen == {("actor", "actor", True): 1}, "both credits of the same samples share the pass"


def test_a_pass_that_was_kept_trains_as_one_that_is_made_again(tmp_path, monkeypatch):
    weights = []
    for k, keeps in enumerate((True, False)):
        monkeypatch.setattr(TorchTrainable, "keeps_graphs", keeps)
        with run_of(tmp_path / str(k), RePULSe(contrast="sixo_exact")).open() as run:
            seen = one_step(run)
            assert (("actor", "proposal", False) in seen) == (not keeps)
            weights.append(
                {f"{name}/{key}": w.clone() for name, role in run.roles.items() for key, w in role.weights()}
            )
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-7)


def test_a_batch_of_several_micro_batches_is_read_twice_and_teaches_the_same(tmp_path):
    weights = []
    for k, tokens in enumerate((8192, 1)):
        with run_of(tmp_path / str(k), RePULSe(), micro_tokens=tokens).open() as run:
            one_step(run)
            weights.append({key: w.clone() for key, w in run.roles["proposal"].weights()})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("updates", [1, 3])
def test_the_proposal_takes_as_many_updates_per_policy_update_as_it_is_told(updates, tmp_path):
    run = run_of(tmp_path, RePULSe(proposal_updates=updates, alpha=0.5), steps=6)
    run.train()
    roles: Mapping[str, Any] = run.roles
    assert {name: role.version for name, role in roles.items()} == {"actor": 6 // updates, "proposal": 6}


def test_several_proposal_updates_need_a_proposal(tmp_path):
    with pytest.raises(UsageError, match="there is no proposal to update"):
        run_of(tmp_path, RePULSe(proposal="base", proposal_updates=2))


@pytest.mark.parametrize("contrast", ["prefix", "sixo_exact"])
def test_an_unnormalized_twist_trains_on_logits_that_are_log_probabilities_before_the_softmax(contrast, tmp_path):
    with run_of(tmp_path, RePULSe(psi="unnormalized", contrast=contrast)).open() as run:
        iteration = next(run.iterations(collect))
        credited = credit(run, iteration)
        batch = next(each for key, each in credited.items() if "<trained>.logits_NT" in each)
        role: Any = run.roles["proposal"]
        ids = torch.cat([batch.prompt_NL[:1, : batch.prompt_lengths_N[0]], batch.tokens_NT[:1]], 1)
        with torch.inference_mode():
            after = role.causal_lm(input_ids=ids).logits[0, batch.prompt_lengths_N[0] - 1 : -1]
        expected = after.gather(1, batch.tokens_NT[0][:, None])[:, 0] * batch.mask_NT[0]
        torch.testing.assert_close(batch["<trained>.logits_NT"][0], expected, rtol=0, atol=1e-5)
        before = {key: tensor.clone() for key, tensor in role.weights()}
        update(run, iteration, credited)
        assert any(not torch.equal(before[key], tensor) for key, tensor in role.weights())
