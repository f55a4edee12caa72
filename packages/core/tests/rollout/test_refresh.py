"""Weights that change between two forward passes of the samplers, against transformers with the same cache in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from test_rollout_sampler import RAGGED, llama, sliding
from test_slot_sampler import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.contract.options import Sampling
from rlhf_core.rollout.narrow_weights import computing_in
from rlhf_core.rollout.sampler import SampledCompletion, sample
from rlhf_core.rollout.slot_sampler import SlotSampler

ENDS = (3, 11)
SAMPLING = Sampling(n=2, max_new_tokens=14)
SEEDS = [[SAMPLING.seed_for(uid, k) for k in range(2)] for uid in range(len(RAGGED))]


class Arrivals:
    """Weights that arrive before the given forward passes, counted from 0: each time all numbers of the model change."""

    def __init__(self, model: Any, *passes: int) -> None:
        self.model, self.passes, self.version = model, passes, 5
        self.count = 0
        self.states = {5: copy.deepcopy(model.state_dict())}

    def __call__(self, change: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
        if self.count in self.passes:
            self.version += 1
            with change(), torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(self.version)
                for parameter in self.model.parameters():
                    parameter.copy_(parameter.flip(0) + 0.05 * torch.randn_like(parameter))
                self.states[self.version] = copy.deepcopy(self.model.state_dict())
        self.count += 1
        return self.version


def log_probabilities(arrivals: Arrivals, prompt: list[int], row: SampledCompletion) -> list[float]:
    """Compute them for each token in float64, one token after the other, each by the weights of its version over one cache."""
    model, cache, ids, found = copy.deepcopy(arrivals.model).double(), None, prompt, list[float]()
    for token, version in zip(row.tokens.tolist(), row.versions.tolist(), strict=True):
        model.load_state_dict(arrivals.states[version])
        with torch.no_grad():
            output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        found.append(float(output.logits[0, -1].log_softmax(-1)[token]))
        cache, ids = output.past_key_values, [token]
    return found


@pytest.mark.parametrize("make", [llama, sliding])
def test_each_token_has_the_version_and_the_probability_of_the_weights_that_computed_it(make: Any) -> None:
    """Pass 0 reads the prompts and gives token 0, pass t gives token t; rows end at different steps."""
    model = make()
    arrivals = Arrivals(model, 4, 9)
    rows = sample(model, RAGGED, SAMPLING, SEEDS, eos_ids=ENDS, pad_id=0, compact=0.5, refresh=arrivals)
    moved = 0.0
    for i, row in enumerate(rows):
        assert row.versions.tolist() == [5 + (t >= 4) + (t >= 9) for t in range(len(row.tokens))]
        expected = log_probabilities(arrivals, RAGGED[i // 2], row)
        assert row.logprobs.tolist() == pytest.approx(expected, abs=1e-3)
        stale = log_probabilities(arrivals, RAGGED[i // 2], row._replace(versions=torch.full_like(row.tokens, 5)))
        moved = max(moved, *(abs(a - b) for a, b in zip(stale, expected, strict=True)))
    assert max(len(row.tokens) for row in rows) > 10 and moved > 0.5, "the wrong weights would show"


def test_waves_after_an_arrival_begin_with_its_weights() -> None:
    model = llama()
    arrivals = Arrivals(model, 3)
    rows = sample(model, [[5, 6], [7, 8]], SAMPLING, SEEDS[:2], eos_ids=(), pad_id=0, wave_tokens=32, refresh=arrivals)
    assert [set(row.versions.tolist()) for row in rows] == [{5, 6}, {5, 6}, {6}, {6}]
    assert arrivals.count == 2 * 14
    for i, row in enumerate(rows):
        assert row.logprobs.tolist() == pytest.approx(
            log_probabilities(arrivals, [[5, 6], [7, 8]][i // 2], row), abs=1e-3
        )


def slots(model: Any, dtype: torch.dtype, refresh: Callable[..., int]) -> list[SampledCompletion]:
    sampler = SlotSampler(model, dtype, flash=False, graphs=False)
    return sampler(RAGGED, SAMPLING, SEEDS, eos_ids=ENDS, refresh=refresh)


def test_slots_take_weights_as_the_other_sampler_does() -> None:
    model, same = llama(), llama()
    found = slots(model, torch.float32, Arrivals(model, 4, 9))
    expected = sample(same, RAGGED, SAMPLING, SEEDS, eos_ids=ENDS, pad_id=0, refresh=Arrivals(same, 4, 9))
    assert_same(found, expected)
    assert [row.versions.tolist() for row in found] == [row.versions.tolist() for row in expected]


def plain(model: Any, dtype: torch.dtype, refresh: Callable[..., int]) -> list[SampledCompletion]:
    with computing_in(model, dtype) as change:
        return sample(model, RAGGED, SAMPLING, SEEDS, eos_ids=ENDS, pad_id=0, refresh=partial(refresh, change))


@pytest.mark.parametrize("sampler", [plain, slots])
def test_narrow_copies_follow_the_weights_that_arrive(sampler: Callable[..., list[SampledCompletion]]) -> None:
    """The sampler computes on copies in bfloat16 meanwhile. The weights that stay are the wide ones that arrived."""
    model = llama()
    arrivals = Arrivals(model, 4)
    rows = sampler(model, torch.bfloat16, arrivals)
    assert all(each.dtype == torch.float32 for each in model.parameters())
    for name, number in model.state_dict().items():
        assert torch.equal(number, arrivals.states[6][name]), name
    apart, stale = (
        torch.cat([
            row.logprobs.double() - torch.tensor(log_probabilities(arrivals, RAGGED[i // 2], row._replace(versions=versions)))
            for i, row in enumerate(rows)
            for versions in [row.versions if right else torch.full_like(row.tokens, 5)]
        ]).abs()
        for right in (True, False)
    )  # fmt: skip
    assert float(apart.mean()) < 0.05 < 0.2 < float(stale.mean()), "rounded to bfloat16, and of the right weights"


class Casts(TorchDispatchMode):
    """Counts what becomes bfloat16 and has the shape of a weight."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        casts = func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
        self.count += casts and found.shape == self.shape and found.dtype == torch.bfloat16
        return found


def test_weights_are_cast_once_and_not_at_every_token() -> None:
    """Autocast alone casts them in each of the 14 steps, and gives the same completions."""
    model = llama()
    with Casts(model.lm_head.weight.shape) as casts:
        found = plain(model, torch.bfloat16, lambda change: 0)
    assert casts.count == 1
    with torch.autocast("cpu", torch.bfloat16), Casts(model.lm_head.weight.shape) as casts:
        expected = sample(model, RAGGED, SAMPLING, SEEDS, eos_ids=ENDS, pad_id=0)
    assert casts.count > 10
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.logprobs, theirs.logprobs)


@pytest.mark.gpu
def test_graphs_follow_weights_that_arrive() -> None:
    """Graphs keep the places of weights. Steps without graphs run the same kernels."""
    with_graphs, without = (llama(hidden_size=64, initializer_range=0.1).to("cuda") for _ in range(2))
    found, expected = (
        SlotSampler(model, torch.bfloat16, graphs=graphs)(
            RAGGED, SAMPLING, SEEDS, eos_ids=ENDS, refresh=Arrivals(model, 4, 9)
        )
        for model, graphs in ((with_graphs, True), (without, False))
    )
    assert_same(found, expected)
    assert {version for row in found for version in row.versions.tolist()} == {5, 6, 7}
