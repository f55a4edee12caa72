"""An engine in processes of its own: equal to `hf`, with weights by shared memory, whenever they come, whoever dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from background_sampling import BackgroundSampling, wait_until
from changed_role import ChangedRole

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import ContractError, RunStopped
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GREEDY = Sampling(n=1, max_new_tokens=12, temperature=0.0)
LONG = Sampling(n=2, max_new_tokens=150, temperature=0.7)


@pytest.fixture(scope="module")
def apart() -> Iterator[VLLMEngines]:
    """The open provider, whose engine has processes of its own once it has been called."""
    provider = VLLMEngines(VLLM(process="own", kv_cache_gib=0.25, max_num_seqs=64))
    yield provider
    provider.close()


@pytest.fixture
def opened(apart: VLLMEngines, role: LocalRole, prompts: Prompts) -> Any:
    """The open engine, as if it had not been updated yet."""
    apart(role, prompts, GREEDY)
    session = apart.engines["actor"]
    session.updates = 1
    return session


def test_it_samples_what_hf_samples_before_and_after_updates(
    apart: VLLMEngines, role: LocalRole, prompts: Prompts, opened: Any, randomize: Callable[..., Any]
) -> None:
    assert VLLM(process="own").has_own_weights
    assert not VLLM().has_own_weights
    for seed in (2001, 2002):
        _same(apart(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY))
        randomize(role, seed=seed)
        metrics = apart.sync(role)
        assert metrics["sync/calls"] == 3
        assert metrics["sync/bytes"] == sum(4 * tensor.numel() for _, tensor in role.weights())
        assert metrics.get("sync/logprob_diff_max", 0.0) < 1e-3
    _same(apart(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY))


def test_a_prompt_is_read_again_after_an_update(
    apart: VLLMEngines, role: LocalRole, opened: Any, make_prompts: Callable[..., Any], randomize: Callable[..., Any]
) -> None:
    """128 tokens are a block of the cache on the CPU; this prompt fills three."""
    prompts = make_prompts(role, ["once upon a time " * 24])
    before = apart(role, prompts, GREEDY)
    randomize(role, seed=2003)
    apart.sync(role)
    after = apart(role, prompts, GREEDY)
    assert before.tokens_NT.tolist() != after.tokens_NT.tolist()
    _same(after, HuggingFaceRollout()(role, prompts, GREEDY))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_tensor_that_is_stale_or_left_out_stops_the_run(
    apart: VLLMEngines, role: LocalRole, opened: Any, name: str, randomize: Callable[..., Any]
) -> None:
    old = {each: tensor.clone() for each, tensor in role.weights()}
    randomize(role, seed=2004)
    stale = ChangedRole(role, lambda each, tensor: [(each, old[each] if each == name else tensor)])
    with pytest.raises(RunStopped, match="differ"):
        apart.sync(stale)  # type: ignore[arg-type]
    randomize(role, seed=2005)
    lacking = ChangedRole(role, lambda each, tensor: [] if each == name else [(each, tensor)])
    with pytest.raises(ContractError, match=r"omitted 1 of the model's tensors; vLLM's '[a-z0-9_.]*' is the first$"):
        apart.sync(lacking)  # type: ignore[arg-type]
    randomize(role, seed=2006)
    apart.sync(role)
    opened.updates = 1
    randomize(role, seed=2007)
    assert apart.sync(role)["sync/logprob_diff_max"] < 1e-3, "the next update is whole again"


def test_tokens_carry_the_version_that_sampled_them_when_weights_come_between(
    apart: VLLMEngines, role: LocalRole, prompts: Prompts, opened: Any, randomize: Callable[..., Any]
) -> None:
    """The tokens from before an update have the old weights' log-probabilities. Those after it keep old keys and values."""
    opened.updates = 5
    before = role.version
    with BackgroundSampling(apart, role, prompts, LONG) as sampling:
        wait_until(lambda: opened.host._waiting > 0)
        time.sleep(0.05)
        old = {name: tensor.clone() for name, tensor in role.weights()}
        randomize(role, seed=2008)
        assert apart.sync(role)["sync/calls"] == 5
    rollouts = sampling.rollouts
    versions_NT, mask_NT = rollouts.extras["versions_NT"], rollouts.mask_NT
    assert set(versions_NT[mask_NT].tolist()) == {before, role.version}
    assert (versions_NT.diff(dim=1)[mask_NT[:, 1:]] >= 0).all(), "versions only grow"
    new = {name: tensor.clone() for name, tensor in role.weights()}
    logprobs = {}
    for version, weights in ((before, old), (role.version, new)):
        _assign(role, weights)
        logprobs[version] = role.infer(rollouts, frozenset({"logprobs_NT"}))["logprobs_NT"]
    early_NT = mask_NT & (versions_NT == before)
    sampled_NT = rollouts["sampler_logprobs_NT"]
    assert early_NT.any()
    torch.testing.assert_close(sampled_NT[early_NT], logprobs[before][early_NT], rtol=0, atol=1e-3)
    first = [(int(row), int(early_NT[row].sum())) for row in range(len(rollouts))]
    wrong = [abs(float(sampled_NT[i, t] - logprobs[before][i, t])) for i, t in first if mask_NT[i, t]]
    assert max(wrong) > 0.1, "the first token after the update is not the old policy's"


def test_processes_that_die_are_started_again_with_the_same_weights(
    apart: VLLMEngines, role: LocalRole, prompts: Prompts, opened: Any
) -> None:
    """Killed in the middle of completions: they are asked again, and none is lost, doubled or mixed up."""
    expected = apart(role, prompts, LONG)
    with BackgroundSampling(apart, role, prompts, LONG) as sampling:
        wait_until(lambda: opened.host._waiting > 0)
        os.kill(opened.host.processes[0], signal.SIGKILL)
    assert opened.host.restarted == 1
    _same(sampling.rollouts, expected)
    _same(apart(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY))


def test_it_leaves_nothing_behind(apart: VLLMEngines, role: LocalRole, prompts: Prompts, opened: Any) -> None:
    processes = opened.host.processes
    assert processes
    apart.close()
    assert not [number for number in processes if Path(f"/proc/{number}").exists()]
    assert threading.active_count() < 50


def _assign(role: LocalRole, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in role.weights():
            tensor.copy_(weights[name])


def _same(ours: Rollouts, theirs: Rollouts) -> None:
    assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
    torch.testing.assert_close(ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=1e-3)
