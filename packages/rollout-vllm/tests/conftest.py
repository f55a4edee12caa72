"""One engine for all tests of a process (starting vLLM takes seconds), and a tiny role whose weights tests change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Example, Prompts
from rlhf_core.contract.options import Sampling
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

TEMPERATURE = 0.7
TEXTS = ["Hello", "What is the colour of the sky?", "1 2 3", "x"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that open an engine need vLLM; the others say what happens without it."""
    if find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vllm is not installed; nox -s 'alone(rollout-vllm)' installs and tests it")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vllm: opens an engine")


@pytest.fixture(scope="session")
def engine() -> Iterator[VLLMEngines]:
    """The open provider, with an engine for `role` once it has been called."""
    provider = VLLMEngines(VLLM(kv_cache_gib=0.25, max_num_seqs=64))
    yield provider
    provider.close()


@pytest.fixture(scope="session")
def the_role() -> LocalRole:
    return LocalRole(
        tiny_run("unused", sampling=Sampling(n=2, max_new_tokens=8, temperature=TEMPERATURE)).plan, "actor"
    )


@pytest.fixture
def role(the_role: LocalRole) -> LocalRole:
    """A tiny actor with weights of its own for each test, and a new version, so that the engine takes them."""
    _randomize(the_role, seed=the_role.version)
    return the_role


@pytest.fixture
def prompts(the_role: LocalRole) -> Prompts:
    return _make_prompts(the_role, TEXTS)


@pytest.fixture(scope="session")
def randomize() -> Callable[..., None]:
    """`randomize(role, seed)`: other weights, and a new version."""
    return _randomize


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., Prompts]:
    """`make_prompts(role, texts)`."""
    return _make_prompts


def _make_prompts(role: LocalRole, texts: list[str]) -> Prompts:
    token_ids = [role.tokenizer(text)["input_ids"] for text in texts]
    return Prompts(texts, token_ids, [Example(text) for text in texts], uids=[11 + i for i in range(len(texts))])


def _randomize(role: Any, seed: int, std: float = 0.25) -> None:
    """Large random weights, so that the distribution is far from flat and every tensor matters.

    Vectors stay around what the architecture begins with: 1 in most norms, 0 in biases and in norms that add 1 themselves. With
    2 in all of these attention is so sharp that transformers' own pass in float32 misses float64 by 0.001.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            center = float(parameter.mean().round()) if parameter.dim() == 1 else 0.0
            parameter.copy_(std * noise + center)
    role.version += 1
