"""Compiled layers give the numbers of plain ones, are computed again in a backward pass, and stay out of sampling."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlhf_core.models.build import build_module
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.testing.tiny import tiny_rollouts

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and this file is not one
from model_rows import spec

# dynamo asks tensors for gradients that only leaves have; torch warns of it, and pytest makes that an error
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

NAMES = frozenset({"logprobs_NT"})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The graphs that are compiled, by their numbers of operations; they run as they are, without a compiler of C++."""
    found: list[int] = []
    original = torch.compile

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        found.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: original(call, dynamic=dynamic, backend=keep))
    return found


@pytest.mark.slow  # tracing takes half a minute of a core
def test_compiled_layers_give_the_numbers_of_plain_ones(graphs: list[int]) -> None:
    """With recomputation in the backward pass; one compilation for all layers and lengths; none without gradient."""
    plain, compiled = (
        build_module(spec(*NAMES, model="tiny:layers=2,hidden=32", gradient_checkpointing=True, compile=each))
        for each in (False, True)
    )
    with torch.no_grad():
        compiled(arrange_inputs(tiny_rollouts()), NAMES)
        compiled.causal_lm(torch.ones(1, 4, dtype=torch.long), use_cache=True)
    assert not graphs, "inference or sampling compiled something"
    sizes = []
    for prompts in (4, 3, 2):
        for module in (plain, compiled):
            outputs = module(arrange_inputs(tiny_rollouts(prompts=prompts, completions=2)), NAMES)
            outputs["logprobs_NT"].sum().backward()
        sizes.append(len(graphs))
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert 0 < sizes[0] <= sizes[1] == sizes[2], "another number of tokens is compiled again"
