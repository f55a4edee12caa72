"""Weights that did not arrive are noticed at the first update, however small the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from changed_role import ChangedRole

from rlhf_core.contract.batch import Prompts
from rlhf_core.contract.options import Lora, Sampling, TrainedOptions
from rlhf_core.errors import RunStopped
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.agreement import check
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

pytestmark = pytest.mark.vllm

GREEDY = Sampling(n=1, max_new_tokens=4, temperature=0.0)
NAME = "model.layers.1.mlp.down_proj.weight"
STEP = 1e-6
"""Change of a weight by an optimizer step."""


@pytest.fixture(scope="module", params=["trainer", pytest.param("own", marks=pytest.mark.slow)])
def engines(request: pytest.FixtureRequest) -> Iterator[VLLMEngines]:
    """The open provider, in this process and in separate ones."""
    provider = VLLMEngines(VLLM(process=request.param, kv_cache_gib=0.25, max_num_seqs=64))
    yield provider
    provider.close()


@pytest.fixture(scope="module")
def actor() -> LocalRole:
    """A tiny actor with adapters, all of whose tensors matter."""
    pytest.importorskip("peft")
    options = TrainedOptions(model="tiny", lora=Lora(rank=4, alpha=8))
    role = LocalRole(tiny_run("unused", sampling=Sampling(n=1, max_new_tokens=8), actor=options).plan, "actor")
    _step(role, 0.25)
    assert role.module.adapters is not None
    with torch.no_grad():
        for site in role.module.adapters.sites:
            role.module.model.get_parameter(site.B).mul_(STEP)  # as after the first steps of training
    return role


def _step(role: LocalRole, size: float) -> None:
    """Change all weights, and the version."""
    generator = torch.Generator().manual_seed(role.version)
    with torch.no_grad():
        for tensor in role.module.parameters():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    role.version += 1


@pytest.fixture
def opened(engines: VLLMEngines, actor: LocalRole, make_prompts: Callable[..., Prompts]) -> Any:
    """The open engine, as if it had not been updated yet."""
    engines(actor, make_prompts(actor, ["Hello", "1 2 3"]), GREEDY)
    session = engines.engines["actor"]
    session.updates = 1
    return session


def test_all_layers_are_compared_and_agree(engines: VLLMEngines, actor: LocalRole, opened: Any) -> None:
    assert opened.changed_layers == frozenset()
    assert [sorted(each) for each in opened.host.checksums()] == [[-1, 0, 1]]
    _step(actor, STEP)
    engines.sync(actor)


@pytest.mark.parametrize("fault", ["a stale tensor", "a stale shard", "a doubled scale of adapters"])
def test_a_fault_that_log_probabilities_do_not_show_stops_the_run_at_the_first_update(
    engines: VLLMEngines, actor: LocalRole, opened: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on the way of the weights; the role has the right ones."""
    old = {name: tensor.clone() for name, tensor in actor.weights()}[NAME]
    _step(actor, STEP)
    half = old.shape[0] // 2
    base = {name: tensor.clone() for name, tensor in actor.base_weights()}[NAME]
    wrong = {
        "a stale tensor": lambda tensor: old,
        "a stale shard": lambda tensor: torch.cat([old[:half], tensor[half:]]),
        "a doubled scale of adapters": lambda tensor: tensor + (tensor - base),
    }[fault]
    take = opened.host.take

    def on_the_way(role: Any) -> Any:
        return take(ChangedRole(role, lambda name, tensor: [(name, wrong(tensor) if name == NAME else tensor)]))

    monkeypatch.setattr(opened.host, "take", on_the_way)
    with pytest.raises(
        RunStopped,
        match=r"^after update 1, weights of rollout 'vllm' in layer 1 differ from those of role 'actor': .* use rollout.*hf",
    ):
        engines.sync(actor)
    check(opened, actor, opened.probe, "the first update")  # log-probabilities are within their bound


def test_comparisons_are_as_many_updates_apart_as_the_option_says(
    engines: VLLMEngines, actor: LocalRole, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    checksums = opened.host.checksums

    def count() -> Any:
        compared.append(opened.updates - 1)
        return checksums()

    monkeypatch.setattr(opened.host, "checksums", count)
    monkeypatch.setattr(engines, "options", replace(engines.options, check_weights=3))
    for _ in range(7):
        _step(actor, STEP)
        engines.sync(actor)
    assert compared == [1, 3, 6]
