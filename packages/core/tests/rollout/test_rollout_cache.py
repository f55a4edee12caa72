"""Equality of numbers with and without the spare cache and the attention of one token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_core.rollout import attention
from rlhf_core.rollout.attention import decode_attention, shared_heads
from rlhf_core.rollout.cache import RoomyLayer, RoomySlidingLayer, make_cache

SMALL: Any = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


def test_a_roomy_layer_holds_what_a_dynamic_one_holds() -> None:
    """Through growth, repeated, dropped and cut rows; keys and values of different size."""
    for room in (0, 60, 400):
        _compare(RoomyLayer(room), DynamicLayer(), cut=True)


@pytest.mark.parametrize("window", [2, 3, 8, 17, 18, 30, 400])
def test_a_roomy_window_holds_what_a_sliding_one_holds(window: int) -> None:
    for room in (0, 20, 217):
        _compare(RoomySlidingLayer(window, room), DynamicSlidingWindowLayer(window), cut=False)


def _compare(ours: Any, theirs: Any, cut: bool) -> None:
    torch.manual_seed(0)
    rows = 3
    for step in range(200):
        if step == 40:
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
            rows *= 2
        if step in (1, 60, 61, 150):
            kept: Any = torch.arange(rows).repeat(2) if step == 1 else torch.arange(rows - 1).flip(0)
            rows = len(kept)
            for layer in (ours, theirs):
                layer.reorder_cache(kept)
        if step == 100 and cut:
            for layer in (ours, theirs):
                layer.crop(-30)
        length = 17 if step == 0 else 5 if step == 120 else 1
        new = torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 6)
        for got, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(ours.keys, theirs.keys)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_layer_with_room_copies_once_and_never_again() -> None:
    """Its buffer is taken at the first decoding step, or where the rows of a prompt are repeated."""
    for repeated in (False, True):
        layer = RoomyLayer(1000)
        layer.update(torch.zeros(2, 2, 100, 4), torch.zeros(2, 2, 100, 4))
        if repeated:
            layer.reorder_cache(torch.tensor([0, 0, 1, 1]))
        rows = 4 if repeated else 2
        states = torch.zeros(rows, 2, 1, 4)
        assert len({layer.update(states, states)[0].data_ptr() for _ in range(900)}) == 1


def test_a_layer_without_room_rarely_copies() -> None:
    layer = RoomyLayer()
    places = {layer.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))[0].data_ptr() for _ in range(1000)}
    assert len(places) < 16


def test_a_window_is_copied_once_per_window() -> None:
    """Its buffer of two windows stays where it is; the view moves on by a token, and back once per window."""
    layer, starts = RoomySlidingLayer(50), []
    for _ in range(1000):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        starts.append(layer.keys.data_ptr() if layer.keys is not None else 0)
    moved_back = sum(after < before for before, after in pairwise(starts[2:]))
    assert 18 <= moved_back <= 20
    assert max(starts[2:]) - min(starts[2:]) <= 100 * 2 * 4


def test_only_layers_of_keys_and_values_are_replaced() -> None:
    plain = make_cache(LlamaConfig(num_hidden_layers=3))
    assert [type(layer) for layer in plain.layers] == [RoomyLayer] * 3
    sliding = make_cache(MistralConfig(num_hidden_layers=2, sliding_window=8))
    assert [type(layer) for layer in sliding.layers] == [RoomySlidingLayer] * 2


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("masked", [True, False])
def test_heads_that_share_keys_attend_as_if_keys_were_repeated(kv_heads: int, length: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(4, 6, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, 4, kv_heads, 11, 8, dtype=torch.float64)
    mask = (torch.rand(4, 1, length, 11) < 0.7) | (torch.arange(11) == 3) if masked else None
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // kv_heads, True
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.2)
    got, _ = decode_attention(module, query, key, value, mask, scaling=0.2)
    torch.testing.assert_close(got, expected)


def test_the_model_attends_that_way_only_inside() -> None:
    """Check that the model gets its own implementation back in all cases."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with pytest.raises(ZeroDivisionError), shared_heads(model):
        assert model.config._attn_implementation == attention.NAME
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_is_not_on_sdpa_or_chooses_by_its_name_keeps_its_attention() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.set_attn_implementation("eager")
    by_name = FalconForCausalLM(FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    for each, own in ((model, "eager"), (by_name, "sdpa")):
        with shared_heads(each):
            assert each.config._attn_implementation == own
