"""Weight transfer on a GPU: the trainer hands its tensors to an engine on the same device, which may sleep between phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_core.contract.options import Sampling
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import check_rollout, tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]

GREEDY = Sampling(n=1, max_new_tokens=16, temperature=0.0)


@pytest.fixture(autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.mark.parametrize("eager", [True, False])
def test_it_keeps_the_contract_with_and_without_graphs(eager: bool) -> None:
    """CUDA graphs point at the weights: an update must leave them where they are."""
    check_rollout(VLLM(gpu_memory_utilization=0.3, enforce_eager=eager, max_num_seqs=16))


def test_weights_follow_the_trainer_and_survive_sleep(
    make_prompts: Callable[..., Any], randomize: Callable[..., Any]
) -> None:
    role: Any = LocalRole(tiny_run("unused").plan, "actor")
    prompts = make_prompts(role, ["Hello", "What is it?"])
    rollout = VLLMEngines(VLLM(gpu_memory_utilization=0.3, max_num_seqs=16, enable_sleep=True))
    try:
        rollout(role, prompts, GREEDY)
        for seed in (1, 2):
            randomize(role, seed=seed)
            rollout.sync(role)
            free = torch.cuda.mem_get_info()[0]
            rollout.sleep()
            assert torch.cuda.mem_get_info()[0] > free, "sleeping gives memory back"
            rollout.wake()
            ours, theirs = rollout(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY)
            assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
            torch.testing.assert_close(ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=1e-3)
    finally:
        rollout.close()


@pytest.mark.parametrize("transfer", ["shared_memory", "ipc", "nccl"])
def test_processes_of_an_engine_get_the_weights(
    transfer: Any, make_prompts: Callable[..., Any], randomize: Callable[..., Any]
) -> None:
    """NCCL joins no GPU with itself: it needs a second one, which the engine's processes get."""
    if transfer == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    role: Any = LocalRole(tiny_run("unused").plan, "actor")
    prompts = make_prompts(role, ["Hello", "What is it?"])
    sizes: dict[str, Any] = {"data_parallel_size": 1, "max_num_seqs": 16, "gpu_memory_utilization": 0.3}
    rollout = VLLMEngines(VLLM(process="own", transfer=transfer, enable_sleep=True, **sizes))
    try:
        rollout(role, prompts, GREEDY)
        for seed in (1, 2):
            randomize(role, seed=seed)
            assert rollout.sync(role)["sync/calls"] == 3
            rollout.sleep(2)
            rollout.wake()
            ours, theirs = rollout(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY)
            assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
            torch.testing.assert_close(ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=1e-3)
    finally:
        rollout.close()
