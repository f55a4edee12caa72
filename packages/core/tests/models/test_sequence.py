"""Rows cut over ranks: the stretches of all ranks together are the rows, whatever their lengths and the pieces of a rank."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.inputs.packing import pack_rows
from rlhf_core.models.inputs.sequence import SequenceShards
from rlhf_core.testing.batches import make_batch


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing attends here")


def pieces_of(rank: int, size: int, zigzag: bool) -> tuple[int, ...]:
    return (rank, 2 * size - 1 - rank) if zigzag else (rank,)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5), st.integers(1, 6), st.booleans()
)
def test_stretches_together_are_the_rows(lengths: list[tuple[int, int]], size: int, zigzag: bool) -> None:
    batch = make_batch([count for _, count in lengths], [prompt for prompt, _ in lengths])
    prompts = [batch.prompt_NL[row, :prompt].tolist() for row, (prompt, _) in enumerate(lengths)]
    completions = [batch.tokens_NT[row, :count].tolist() for row, (_, count) in enumerate(lengths)]
    rows, packed = pack_rows(arrange_inputs(batch))
    pieces = [pieces_of(rank, size, zigzag) for rank in range(size)]
    cuts = [SequenceShards(each, size, None, unused).cut(rows, packed) for each in pieces]
    order = torch.tensor([piece for each in pieces for piece in each]).argsort()

    def in_order(name: str) -> list[int]:
        joined: torch.Tensor = torch.cat([cut.arguments[name][0] for cut in cuts]).view(len(order), -1)[order]
        return joined.flatten().tolist()

    tokens = [token for pair in zip(prompts, completions, strict=True) for part in pair for token in part]
    ids = in_order("input_ids")
    assert ids == tokens + [0] * (-len(tokens) % len(order))
    positions = in_order("position_ids")
    assert positions[: len(tokens)] == [at for prompt, count in lengths for at in range(prompt + count)]
    assert {int(cut.arguments["cu_seq_lens_q"][-1]) for cut in cuts} == {len(ids)}

    assert torch.cat([cut.inputs.slots_M for cut in cuts]).sort().values.equal(packed.slots_M)
    predicted = {
        int(slot): (int(cut.arguments["input_ids"][0, state]), int(target))
        for cut in cuts
        for slot, state, target in zip(cut.inputs.slots_M, cut.inputs.states_M, cut.inputs.targets_M, strict=True)
    }
    assert [predicted[slot] for slot in sorted(predicted)] == [
        ([*prompt, *completion][at], [*prompt, *completion][at + 1])
        for prompt, completion in zip(prompts, completions, strict=True)
        for at in range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    ]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        (owner,) = [cut for cut in cuts if cut.own_N[row]]
        assert int(owner.arguments["input_ids"][0, owner.inputs.last_N[row]]) == [*prompt, *completion][-1]
