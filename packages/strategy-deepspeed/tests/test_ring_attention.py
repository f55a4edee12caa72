"""Ring attention: blocks and their merging beside float64, ranks of gloo beside one process, bytes, work, and deadlines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.errors import UsageError
from rlhf_core.testing import run_ranks
from rlhf_strategy_deepspeed import ring_blocks
from rlhf_strategy_deepspeed.ring import RingAttention, check_layers, zigzag
from rlhf_strategy_deepspeed.ring_blocks import Block, add_gradients, attend, merge, plan_blocks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import ring_ranks

SIZES = (2, 3, 4)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Return attention (h, T, D) to the keys that are `seen` (T, T), by the definition."""
    repeated = [each.repeat_interleave(len(query) // len(each), 0) for each in (key, value)]
    scores = (query @ repeated[0].transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights @ repeated[1]


def seen_in_rows(bounds: list[int]) -> Tensor:
    """Return which tokens attend to which (T, T), one by one."""
    rows = [row for row, length in enumerate(torch.tensor(bounds).diff().tolist()) for _ in range(length)]
    return torch.tensor([[rows[at] == rows[to] and to <= at for to in range(len(rows))] for at in range(len(rows))])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.sampled_from([5, 2**22]))
def test_blocks_of_all_ranks_together_are_attention(lengths: list[int], size: int, scores: int) -> None:
    """Every rank in turn, in float64: outputs, and gradients of queries, keys and values."""
    fill = -sum(lengths) % (2 * size)
    bounds = [0, *torch.tensor([*lengths, *([fill] if fill else [])]).cumsum(0).tolist()]
    width = bounds[-1] // (2 * size)
    torch.manual_seed(sum(lengths))
    shapes = [(6, bounds[-1], 4), (2, bounds[-1], 4), (2, bounds[-1], 3)]
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = softmax_attention(*whole, seen_in_rows(bounds), 0.4)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)

    def part(tensor: Tensor, rank: int) -> Tensor:
        return torch.cat([tensor.detach()[:, piece * width : (piece + 1) * width] for piece in zigzag(rank, size)], 1)

    to_others = {rank: [torch.zeros_like(part(each, rank)) for each in whole[1:]] for rank in range(size)}
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(ring_blocks, "SCORES", scores)
        for rank in range(size):
            query = part(whole[0], rank)
            output, total = query.new_zeros(*query.shape[:2], 3), query.new_full(query.shape[:2], -torch.inf)
            blocks = {
                other: plan_blocks(bounds, width, zigzag(rank, size), zigzag(other, size)) for other in range(size)
            }
            for other in sorted(blocks, key=lambda each: -each):
                for block in blocks[other]:
                    here = part(whole[1], other), part(whole[2], other)
                    merge(output, total, block, attend(query, *here, block, 0.4))
            torch.testing.assert_close(output, part(expected, rank), rtol=0.0, atol=1e-12)
            to_query, given_ = torch.zeros_like(query), (output, part(gradient, rank), total)
            for other in blocks:
                for block in blocks[other]:
                    parts = query, part(whole[1], other), part(whole[2], other)
                    add_gradients((to_query, to_others[other][0], to_others[other][1]), parts, given_, block, 0.4)
            torch.testing.assert_close(to_query, part(_gradient(whole[0]), rank), rtol=0.0, atol=1e-12)
    for rank, found in to_others.items():
        for tensor, one in zip(whole[1:], found, strict=True):
            torch.testing.assert_close(one, part(_gradient(tensor), rank), rtol=0.0, atol=1e-12)


def test_every_rank_has_the_same_work_of_a_long_row() -> None:
    """Pairs of a query and a key, of one row over 4 ranks: all of them once, and as many on each rank."""
    size, width = 4, 8
    pairs = []
    for rank in range(size):
        plans = [plan_blocks([0, 64], width, zigzag(rank, size), zigzag(other, size)) for other in range(size)]
        pairs.append(sum(work(block) for blocks in plans for block in blocks))
    assert pairs == [64 * 65 // 2 // size] * size


def work(block: Block) -> int:
    """Return the number of pairs of a query and a key."""
    whole = (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
    return sum(length * (length + 1) // 2 for length in block.rows) or whole


def test_rows_inside_a_piece_meet_no_other_rank() -> None:
    bounds = list(range(0, 65, 8))
    assert all(
        not plan_blocks(bounds, 8, zigzag(rank, 4), zigzag(other, 4))
        for rank in range(4)
        for other in range(4)
        if rank != other
    )


def test_scores_are_held_for_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the scores of 4 heads and 64 x 64 pairs where 1,024 fit at once."""
    held: list[int] = []
    scores = ring_blocks._scores

    def counted(*arguments: Any) -> Tensor:
        found = scores(*arguments)
        held.append(found.numel())
        return found

    monkeypatch.setattr(ring_blocks, "SCORES", 1024)
    monkeypatch.setattr(ring_blocks, "_scores", counted)
    query, key = torch.randn(4, 64, 8), torch.randn(2, 64, 8)
    attend(query, key, key, Block(slice(0, 64), slice(0, 64)), 1.0)
    assert held == [1024] * 16


# ----------------------------------------------------------------------------------------------------------------------
# ranks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SIZES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Return what each rank of a number of ranks found."""
    folder = tmp_path_factory.mktemp(f"ring{request.param}")
    done = run_ranks(request.param, ring_ranks.compare, folder, seconds=120.0)
    assert not any(rank.code for rank in done), done[0].stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


TOLERANCE = {"torch.float64": 1e-12, "torch.float32": 1e-5, "torch.bfloat16": 0.15}
"""Largest errors of sums of up to 48 products of normal numbers; bfloat16 rounds inputs and results to 8 bits."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", ring_ranks.ROWS)
def test_ranks_compute_what_one_process_computes(rows: str, dtype: str, found: list[dict[Any, Any]]) -> None:
    """The output, and the gradients of queries, keys and values, of grouped heads that no number of ranks divides."""
    for rank in found:
        errors, _, same_dtype = rank[rows, dtype]
        assert max(errors) < TOLERANCE[dtype]
        assert same_dtype


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ranks_send_the_bytes_of_the_formula(dtype: str, found: list[dict[Any, Any]]) -> None:
    """Keys and values of the own tokens to all other ranks, and their gradients, which are float32 or wider."""
    size = len(found)
    bytes_each = {"torch.float64": 8, "torch.float32": 4, "torch.bfloat16": 2}[dtype]
    numbers = 2 * (size - 1) * ring_ranks.TOKENS // size * ring_ranks.KEY_HEADS * ring_ranks.DIM
    for rank in found:
        for rows in ring_ranks.ROWS:
            assert rank[rows, dtype][1] == (numbers * bytes_each, numbers * (bytes_each + max(4, bytes_each)))


def test_a_rank_that_does_not_come_is_waited_for_until_the_limit(tmp_path: Path) -> None:
    done = run_ranks(2, ring_ranks.wait_for_nobody, tmp_path, seconds=60.0)
    assert [rank.code for rank in done] == [0, 0], done[0].stderr[-2000:]
    assert "1000ms" in (tmp_path / "message").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# what it does not compute
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"sliding_window": 4096}, "sliding_attention"),
    ],
)
def test_layers_of_another_kind_are_refused(text: dict[str, Any], kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_layers(SimpleNamespace(**text))
    assert str(caught.value) == (
        f"sequence_kind ring computes causal attention to whole rows alone, but this model has {kind} layers; choose ulysses"
    )


@pytest.mark.parametrize(
    "text", [{"layer_types": ["full_attention"] * 2, "sliding_window": 8}, {"sliding_window": None}, {}]
)
def test_full_attention_is_not_refused(text: dict[str, Any]) -> None:
    check_layers(SimpleNamespace(**text))


@pytest.mark.parametrize("given", [{"sliding_window": 8}, {"is_causal": False}])
def test_a_layer_that_asks_for_something_else_is_refused(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(
        UsageError, match="ring computes causal attention to whole rows alone, but this model has Linear"
    ):
        RingAttention(None)(torch.nn.Linear(1, 1), states, states, states, torch.tensor([0, 8]), **given)


# ----------------------------------------------------------------------------------------------------------------------
# GPUs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(), (5, 40, 19)])
def test_flash_attention_computes_what_the_mathematics_computes(rows: tuple[int, ...]) -> None:
    """Two blocks in bfloat16 on the GPU, and their gradients with the sum over both."""
    blocks = [Block(slice(64, 128), slice(0, 64)), Block(slice(64, 128), slice(64, 128), rows or (64,))]
    torch.manual_seed(0)
    whole = [torch.randn(shape, device="cuda").bfloat16() for shape in ((6, 128, 64), (2, 128, 64), (2, 128, 64))]
    gradient = torch.randn(6, 128, 64, device="cuda").bfloat16()

    def computed(parts: list[Tensor]) -> list[Tensor]:
        output, total = torch.zeros_like(parts[0]).float(), torch.full((6, 128), -torch.inf, device="cuda")
        for block in blocks:
            merge(output, total, block, attend(parts[0], parts[1], parts[2], block, 0.125))
        into = [torch.zeros_like(each).float() for each in parts]
        for block in blocks:
            given_ = output.to(parts[0].dtype), gradient.to(parts[0].dtype), total
            add_gradients((into[0], into[1], into[2]), (parts[0], parts[1], parts[2]), given_, block, 0.125)
        return [output, *into]

    assert ring_blocks._takes_flash(whole[0], whole[2])
    for found, expected in zip(computed(whole), computed([each.float() for each in whole]), strict=True):
        torch.testing.assert_close(found[:, 64:], expected[:, 64:], rtol=0.05, atol=0.05)


def test_flash_attention_is_called_as_torch_declares_it() -> None:
    """Shapes alone, of tensors without numbers: no GPU is needed, and no result is compared."""
    query, key = (torch.empty(heads, 24, 16, device="meta", dtype=torch.bfloat16) for heads in (6, 2))
    for block in (Block(slice(0, 10), slice(4, 24)), Block(slice(0, 24), slice(0, 24), (4, 20))):
        output, total = ring_blocks._flash(query, key, key, block, 0.25)
        found = ring_blocks._flash_gradients((query, key, key), (output, output, total), block, 0.25)
        count, keys = block.queries.stop, (2, block.keys.stop - block.keys.start, 16)
        assert (output.shape, total.shape) == ((6, count, 16), (6, count))
        assert [each.shape for each in found] == [(6, count, 16), keys, keys]


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
