"""Two real vLLM servers as one engine: what they sample is what `hf` samples, whatever happens to them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from background_sampling import BackgroundSampling, wait_until
from changed_role import ChangedRole
from transformers import AutoModelForCausalLM
from version_spans import span_logprobs

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import ContractError, RunStopped
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.training.local_role import LocalRole
from rlhf_core.util.http import FAILURES, ask_server
from rlhf_rollout_vllm.description import describe_model
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines
from rlhf_rollout_vllm.vllm_plugin import TRAINER

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GREEDY = Sampling(n=1, max_new_tokens=12, temperature=0.0)
LONG = Sampling(n=4, max_new_tokens=150, temperature=0.7)
TOKEN = "a-token-of-tests"
SECONDS = 600.0

ARGUMENTS = (
    "--load-format dummy --enable-scale-out --host 127.0.0.1 --dtype float32 --kv-cache-memory-bytes 268435456 "
    "--max-num-seqs 64 --enforce-eager --no-enable-chunked-prefill --logprobs-mode processed_logprobs --max-logprobs 144"
).split()


@pytest.fixture(scope="module")
def running(the_role: LocalRole, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, int]]]:
    """Addresses and processes of two servers."""
    folder = tmp_path_factory.mktemp("model")
    model = describe_model(the_role.spec.options, str(folder))
    backend = '{"backend": "rlhf_shared_memory"}'
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": TOKEN, "VLLM_NO_USAGE_STATS": "1"}
    environment[TRAINER] = str(os.getpid())  # they end with the tests, however those end
    started = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
        process = subprocess.Popen(
            [*command, *ARGUMENTS, "--weight-transfer-config", backend],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        started.append((f"http://127.0.0.1:{port}", process))
    try:
        for url, process in started:
            wait_until(lambda url=url, process=process: process.poll() is not None or _answers(url), SECONDS)  # type: ignore[misc]
            assert process.poll() is None
        yield [(url, process.pid) for url, process in started]
    finally:
        for _, process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        return bool(ask_server(f"{url}/v1/models", token=TOKEN, timeout=10))
    except FAILURES:
        time.sleep(0.5)  # it takes a minute to start, and needs the processor
        return False


@pytest.fixture(scope="module")
def served(running: list[tuple[str, int]]) -> Iterator[VLLMEngines]:
    """The open provider over both servers."""
    provider = VLLMEngines(VLLM(server=tuple(url for url, _ in running), token=TOKEN))
    yield provider
    provider.close()


@pytest.fixture
def opened(served: VLLMEngines, role: LocalRole, prompts: Prompts) -> Any:
    """The open engine, as if it had not been updated yet."""
    served(role, prompts, GREEDY)
    session = served.engines["actor"]
    session.updates = 1
    return session


def test_servers_sample_what_hf_samples_before_and_after_updates(
    served: VLLMEngines, role: LocalRole, prompts: Prompts, opened: Any, randomize: Callable[..., Any]
) -> None:
    for seed in (2001, 2002):
        _same(served(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY))
        randomize(role, seed=seed)
        metrics = served.sync(role)
        assert metrics["sync/calls"] == 3
        assert metrics["sync/bytes"] == sum(4 * tensor.numel() for _, tensor in role.weights())
        assert metrics.get("sync/logprob_diff_max", 0.0) < 1e-3
    _same(served(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY))


def test_kept_tokens_are_those_after_truncation(served: VLLMEngines, role: LocalRole, prompts: Prompts) -> None:
    rollouts = served(role, prompts, Sampling(n=2, max_new_tokens=20, temperature=0.7, top_k=5))
    for row, kept in enumerate(rollouts.kept_sets):
        length = int(rollouts.mask_NT[row].sum())
        assert kept.counts_T.tolist() == [5] * length


def test_tokens_carry_the_version_that_sampled_them_when_weights_come_between(
    served: VLLMEngines, role: LocalRole, prompts: Prompts, opened: Any, randomize: Callable[..., Any], tmp_path: Path
) -> None:
    """Those after the update have the new weights' log-probabilities, over keys and values of the old weights."""
    opened.updates = 5
    before, weights = role.version, {role.version: {name: tensor.clone() for name, tensor in role.weights()}}
    asked = opened.host._asked + LONG.n * len(prompts)
    with BackgroundSampling(served, role, prompts, LONG) as sampling:
        wait_until(lambda: opened.host._asked == asked, SECONDS)  # some may be answered already
        randomize(role, seed=2008)
        assert served.sync(role)["sync/calls"] == 5
    weights[role.version] = {name: tensor.clone() for name, tensor in role.weights()}
    rollouts = sampling.rollouts
    versions_NT, mask_NT = rollouts.extras["versions_NT"], rollouts.mask_NT
    assert set(versions_NT[mask_NT].tolist()) <= {before, role.version}
    assert role.version in versions_NT[mask_NT]
    assert (versions_NT.diff(dim=1)[mask_NT[:, 1:]] >= 0).all(), "versions only grow"
    role.export(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for i, length in enumerate(rollouts.lengths_N.tolist()):
        prompt = rollouts.prompt_NL[i, : int(rollouts.prompt_lengths_N[i])].tolist()
        tokens, versions = rollouts.tokens_NT[i, :length].tolist(), versions_NT[i, :length].tolist()
        expected_T = span_logprobs(model, weights, prompt, tokens, versions, LONG.temperature)
        torch.testing.assert_close(rollouts["sampler_logprobs_NT"][i, :length], expected_T, rtol=0, atol=1e-3)


def test_a_tensor_that_is_stale_or_left_out_stops_the_run(
    served: VLLMEngines, role: LocalRole, opened: Any, randomize: Callable[..., Any]
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    old = {each: tensor.clone() for each, tensor in role.weights()}
    randomize(role, seed=2004)
    stale = ChangedRole(role, lambda each, tensor: [(each, old[each] if each == name else tensor)])
    with pytest.raises(RunStopped, match="differ"):
        served.sync(stale)  # type: ignore[arg-type]
    randomize(role, seed=2005)
    lacking = ChangedRole(role, lambda each, tensor: [] if each == name else [(each, tensor)])
    with pytest.raises(ContractError, match=r"omitted 1 of the model's tensors; vLLM's '[a-z0-9_.]*' is the first$"):
        served.sync(lacking)  # type: ignore[arg-type]
    randomize(role, seed=2006)
    opened.updates = 1
    assert served.sync(role)["sync/logprob_diff_max"] < 1e-3, "the next update is whole again"


def test_a_server_with_the_weights_of_another_run_gets_those_of_this_one(
    served: VLLMEngines, running: list[tuple[str, int]], role: LocalRole, prompts: Prompts, opened: Any
) -> None:
    expected = served(role, prompts, GREEDY)
    before = opened.host.restarted
    ask_server(f"{running[0][0]}/update_weight_version", {"new_version": "another-run-1"}, TOKEN)
    _same(served(role, prompts, GREEDY), expected)
    assert opened.host.restarted == before + 1


def test_a_server_that_is_killed_costs_no_completion(
    served: VLLMEngines, running: list[tuple[str, int]], role: LocalRole, prompts: Prompts, opened: Any
) -> None:
    """The last test: one of the servers is gone from here on."""
    expected = served(role, prompts, LONG)
    with BackgroundSampling(served, role, prompts, LONG) as sampling:
        wait_until(lambda: opened.host._waiting > 0, SECONDS)
        os.killpg(running[0][1], signal.SIGKILL)
    _same(sampling.rollouts, expected)
    role.version += 1
    assert served.sync(role)["sync/calls"] == 3
    _same(served(role, prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY))


def _same(ours: Rollouts, theirs: Rollouts) -> None:
    assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
    torch.testing.assert_close(ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=1e-3)
