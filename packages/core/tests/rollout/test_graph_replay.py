"""The GPU sampler's graphs, recorded and replayed on the CPU, against the same steps without graphs, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_emulator import EmulatedGraph, emulate_graphs
from test_refresh import Arrivals
from test_rollout_sampler import RAGGED, llama, sliding
from test_slot_sampler import RULES

from rlhf_core import Example, Prompts, Sampling
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.rollout.sampler import SampledCompletion
from rlhf_core.rollout.slot_sampler import SlotSampler, try_out
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[EmulatedGraph]:
    return emulate_graphs(monkeypatch)


def sampler_of(
    model: Any, dtype: torch.dtype = torch.float32, *, graphs: bool = True, cells: int = 2000
) -> SlotSampler:
    return SlotSampler(model, dtype, cells=cells, flash=False, graphs=graphs)


def draw(sampler: SlotSampler, sampling: Sampling, prompts: list[list[int]] = RAGGED, **options: Any) -> Any:
    seeds = [[sampling.seed_for(uid, k) for k in range(sampling.n)] for uid in range(len(prompts))]
    return sampler(prompts, sampling, seeds, **{"eos_ids": (3, 11), **options})


def assert_equal(found: list[SampledCompletion], expected: list[SampledCompletion]) -> None:
    """Bit for bit: the operations are the same ones."""
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.finish == theirs.finish
        for name in ("tokens", "logprobs", "log_mass", "versions"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_give_what_steps_give(graphs: type[EmulatedGraph], rules: str, dtype: torch.dtype) -> None:
    """Rows that end and buckets that shrink; in bfloat16 by narrow copies of the weights under autocast."""
    sampling = Sampling(n=4, max_new_tokens=30, **RULES[rules])
    options = {"limits": [30, 3, 12, 1, 30], "lacking": (7,), "eos_ids": (11,)}
    model = sliding()
    found = draw(sampler_of(model, dtype), sampling, **options)
    assert graphs.recorded >= 2 and graphs.replays > 2 * graphs.recorded
    assert_equal(found, draw(sampler_of(model, dtype, graphs=False), sampling, **options))


def test_waves_share_graphs(graphs: type[EmulatedGraph]) -> None:
    """Every wave but the last has as many rows as fit, and another one's cells."""
    model, sampling = llama(), Sampling(n=8, max_new_tokens=12)
    found = draw(sampler_of(model, cells=90), sampling, eos_ids=())
    assert graphs.recorded < graphs.replays / 11
    assert_equal(found, draw(sampler_of(model, graphs=False, cells=90), sampling, eos_ids=()))


def test_graphs_of_one_call_serve_the_next(graphs: type[EmulatedGraph]) -> None:
    """Other prompts, other numbers in the weights and fewer tokens: nothing is recorded again, and nothing is stale."""
    model, sampling = llama(), Sampling(n=2, max_new_tokens=20)
    sampler = sampler_of(model)
    draw(sampler, sampling, limits=[20] * 5, eos_ids=())
    recorded = graphs.recorded
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(1.2)
    prompts = [[8, 9], [7, 6, 5], [1], [2, 2, 2], [12, 13, 14, 15]]
    shorter = Sampling(n=2, max_new_tokens=15)
    found = draw(sampler, shorter, prompts, eos_ids=())
    assert graphs.recorded == recorded
    assert_equal(found, draw(sampler_of(model, graphs=False), shorter, prompts, eos_ids=()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moves", [False, True])
def test_weights_that_arrive_in_the_middle_are_those_of_the_next_step(
    graphs: type[EmulatedGraph], dtype: torch.dtype, moves: bool
) -> None:
    """Also where they come in other memory, as from ranks that gather them anew: a graph reads where they were."""

    class Moving(Arrivals):
        def __call__(self, change: Any) -> int:  # type: ignore[override]
            version, old = self.version, [each.data for each in self.model.parameters()]
            if moves and self.count in self.passes:
                with change():
                    for each in self.model.parameters():
                        each.data = each.data.clone()
                for each in old:
                    each.fill_(torch.nan)
            found = super().__call__(change)
            assert (found > version) == (self.count - 1 in self.passes)
            return found

    sampling = Sampling(n=3, max_new_tokens=20)
    found, expected = (
        draw(sampler_of(model, dtype, graphs=each), sampling, refresh=Moving(model, 4, 9))
        for each, model in ((True, llama()), (False, llama()))
    )
    assert {int(each) for row in found for each in row.versions} == {5, 6, 7}
    assert_equal(found, expected)


def test_a_trial_records_a_graph_too(graphs: type[EmulatedGraph]) -> None:
    """A step that reads a number on the host is right each time it runs, and stale in a graph."""
    model = llama()
    assert try_out(model, torch.float32, flash=False, graphs=True)[0] == ""
    assert (graphs.recorded, graphs.replays) == (1, 2)

    def fix(module: Any, args: Any, options: dict[str, Any]) -> Any:
        given = options.get("position_ids")
        return args, options if given is None else options | {"position_ids": torch.tensor(given.tolist())}

    model.model.register_forward_pre_hook(fix, with_kwargs=True)
    assert try_out(model, torch.float32, flash=False)[0] == ""
    assert "gives a different result in such a step" in try_out(model, torch.float32, flash=False, graphs=True)[0]


def test_a_model_that_cannot_be_recorded_keeps_the_other_sampler(
    graphs: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch does, a recording that fails raises once more at its end; the line has the first error."""

    @contextmanager
    def refuse(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    obstacle, _ = try_out(llama(), torch.float32, flash=False, graphs=True)
    assert obstacle == "LlamaForCausalLM fails in such a step: operation not permitted when stream is capturing"


def test_a_role_with_adapters_and_the_one_without_share_no_graph(
    graphs: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They share the model; a graph has what was added to it when it was recorded."""
    pytest.importorskip("peft")
    actor = LocalRole(tiny_run(tmp_path, model="tiny:hidden=16,layers=1", actor={"lora": {"rank": 2}}).plan, "actor")
    reference = copy.copy(actor)
    reference.name, reference.trainable = "reference", actor.trainable.shared_base()
    with torch.no_grad():
        for parameter in actor.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    prompts = Prompts(["a", "b"], [[5, 6, 7], [8]], [Example("a"), Example("b")], [0, 1])
    greedy = Sampling(n=2, max_new_tokens=8, temperature=0)
    expected = [HuggingFaceRollout()(role, prompts, greedy) for role in (actor, reference)]
    monkeypatch.setattr("rlhf_core.rollout.slot_sampler.slot_obstacle", lambda *_: "")
    monkeypatch.setattr("rlhf_core.rollout.slot_sampler.SlotSampler", partial(SlotSampler, flash=False))
    engine = HuggingFaceRollout(wave_tokens=200).open(None)  # type: ignore[arg-type]
    for _ in range(2):
        for role, batch in zip((actor, reference), expected, strict=True):
            found = engine(role, prompts, greedy)
            assert torch.equal(found.tokens_NT, batch.tokens_NT)
            torch.testing.assert_close(found["sampler_logprobs_NT"], batch["sampler_logprobs_NT"], rtol=1e-4, atol=1e-4)
    assert graphs.recorded == 2
    assert not torch.equal(*(batch["sampler_logprobs_NT"] for batch in expected)), "the adapters do nothing"
