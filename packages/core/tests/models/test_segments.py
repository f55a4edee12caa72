"""A completion of several segments gives the outputs and gradients of its segments as rows of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_packing import CONFIGS, checkpoint, rows, spec

from rlhf_core.contract.batch import Batch
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs.arrange import arrange_inputs

NAMES = frozenset({"logprobs_NT", "values_NT"})
PARTS = [[(3, 5)], [(7, 2), (4, 3), (2, 6)], [(1, 4)], [(5, 1), (6, 2)]]
"""Prompt and completion tokens of each segment, row by row."""


def segmented() -> tuple[Batch, Batch, list[list[tuple[int, int, int]]]]:
    """Return rows with segments, the segments as rows of their own, and where in a row each segment's completion begins."""
    apart = rows([size for row in PARTS for size in row])
    shapes, places, joined, numbers, first = [], [], [], [], 0
    for row in PARTS:
        tokens: list[int] = []
        segments: list[int] = []
        place = []
        for s, (prompt, length) in enumerate(row):
            if s:
                tokens += apart.prompt_NL[first + s, :prompt].tolist()
            place.append((first + s, len(tokens), length))
            tokens += apart.tokens_NT[first + s, :length].tolist()
            segments += [s] * (len(tokens) - len(segments))
        shapes.append((row[0][0], len(tokens)))
        joined.append(tokens)
        numbers.append(segments)
        places.append(place)
        first += len(row)
    whole = rows(shapes)
    segments_NT = torch.zeros(whole.tokens_NT.shape, dtype=torch.long)
    for i, (tokens, segments) in enumerate(zip(joined, numbers)):
        whole.prompt_NL[i, : shapes[i][0]] = apart.prompt_NL[places[i][0][0], : shapes[i][0]]
        whole.tokens_NT[i, : len(tokens)] = torch.tensor(tokens)
        segments_NT[i, : len(tokens)] = torch.tensor(segments)
    return whole.with_extras(segments_NT=segments_NT), apart, places


@pytest.mark.parametrize("packing", [True, False])
def test_segments_are_read_as_rows_of_their_own(packing: bool, tmp_path: Path) -> None:
    module = build_module(spec(checkpoint(CONFIGS["qwen2"], tmp_path), *NAMES, packing=packing))
    whole, apart, places = segmented()
    expected = module(arrange_inputs(apart), NAMES)
    found = module(arrange_inputs(whole), NAMES)
    for name in NAMES:
        pairs = [
            (found[name][i, start : start + length], expected[name][row, :length])
            for i, place in enumerate(places)
            for row, start, length in place
        ]
        ours, theirs = (torch.cat(side) for side in zip(*pairs))
        assert len(ours) == sum(length for row in PARTS for _, length in row)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        gradients = []
        for side in (ours, theirs):
            module.zero_grad()
            (side * torch.linspace(-1, 1, len(side))).sum().backward(retain_graph=True)
            gradients.append({key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None})
        for key, value in gradients[1].items():
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(gradients[0][key] / scale, value / scale, rtol=0, atol=1e-5)


def test_without_the_numbers_of_segments_the_context_would_be_another(tmp_path: Path) -> None:
    module = build_module(spec(checkpoint(CONFIGS["qwen2"], tmp_path), *NAMES))
    whole, apart, places = segmented()
    del whole.extras["segments_NT"]
    expected, found = module(arrange_inputs(apart), NAMES), module(arrange_inputs(whole), NAMES)
    row, start, length = places[1][1]
    difference = found["logprobs_NT"][1, start : start + length] - expected["logprobs_NT"][row, :length]
    assert float(difference.detach().abs().max()) > 0.01
