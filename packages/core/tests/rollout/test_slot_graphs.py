"""Compiled steps of the GPU's sampler, and on a GPU its kernel and graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_rollout_sampler import RAGGED, llama, sliding
from test_slot_sampler import RULES, assert_same
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from rlhf_core.contract.options import Sampling
from rlhf_core.models.inputs.packing import can_pack
from rlhf_core.rollout import slot_sampler as file
from rlhf_core.rollout.compiled_blocks import find_blocks
from rlhf_core.rollout.slot_sampler import SlotSampler
from rlhf_core.rollout.slots import Slots, attend_masked


def test_one_compiled_block_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the first number of rows and once for all others, of each model; nothing else of it is compiled."""
    from torch._dynamo.testing import CompileCounter

    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: real(call, backend=counter, fullgraph=True))
    sampling, limits = Sampling(n=3, max_new_tokens=20), [20, 5, 9, 1, 20]
    seeds = [[sampling.seed_for(uid, k) for k in range(3)] for uid in range(len(RAGGED))]
    for number, policy in enumerate((llama(), sliding()), 1):
        compiled, plain = (
            SlotSampler(policy, torch.float32, flash=False, graphs=False, compile_steps=each)(
                RAGGED, sampling, seeds, eos_ids=(3,), limits=limits
            )
            for each in (True, False)
        )
        assert_same(compiled, plain)
        assert counter.frame_count == 2 * number
        assert all(each._compiled_call_impl is None for each in policy.modules())


def test_blocks_are_those_of_the_outermost_list() -> None:
    """Lists inside of a block, such as one of experts, hold no blocks."""
    attentions = [nn.Linear(1, 1) for _ in range(3)]
    body = nn.ModuleDict(
        {
            "layers": nn.ModuleList([nn.ModuleDict({"inner": nn.ModuleList([each])}) for each in attentions]),
            "others": nn.ModuleList([nn.Linear(1, 1)]),
        }
    )
    assert find_blocks(body, attentions) == list(body["layers"])


@pytest.mark.gpu
def test_compiled_blocks_give_what_blocks_give_on_a_gpu() -> None:
    """In bfloat16, greedy: log-probabilities of the tokens that both draw, within the rounding of the dtype."""
    policy = llama(hidden_size=64, initializer_range=0.1).to("cuda")
    assert can_pack(policy)
    sampling = Sampling(n=1, max_new_tokens=12, temperature=0.0)
    seeds = [[0] for _ in RAGGED]
    compiled, plain = (
        SlotSampler(policy, torch.bfloat16, compile_steps=each)(RAGGED, sampling, seeds, eos_ids=())
        for each in (True, False)
    )
    for ours, theirs in zip(compiled, plain, strict=True):
        same = int((ours.tokens == theirs.tokens).long().cumprod(0).sum())
        assert same >= 1
        torch.testing.assert_close(ours.logprobs[:same], theirs.logprobs[:same], rtol=0, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_graphs_give_what_single_operations_give(rules: str, weights: torch.dtype) -> None:
    """On a GPU in bfloat16: log-probabilities of the drawn tokens against a forward pass over them, rows that end included."""
    policy = llama(hidden_size=64, initializer_range=0.1).to("cuda", weights)
    assert can_pack(policy)
    assert file.slot_obstacle(policy, torch.bfloat16) == ""
    sampling = Sampling(n=8, max_new_tokens=40, **RULES[rules])
    seeds = [[sampling.seed_for(uid, k) for k in range(8)] for uid in range(len(RAGGED))]
    graphs, single = (
        SlotSampler(policy, torch.bfloat16, graphs=each)(RAGGED, sampling, seeds, eos_ids=(3, 11))
        for each in (True, False)
    )
    for ours, theirs in zip(graphs, single, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-5)
    for row, ours in enumerate(graphs):
        prompt, tokens = RAGGED[row // 8], ours.tokens.tolist()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits = policy(torch.tensor([prompt + tokens], device="cuda"), use_cache=False).logits[
                0, len(prompt) - 1 : -1
            ]
        scores = (logits.float().cpu() / (sampling.temperature or 1)).log_softmax(-1)
        expected = scores.gather(1, ours.tokens[:, None])[:, 0]
        torch.testing.assert_close(ours.logprobs + ours.log_mass, expected, rtol=0, atol=0.15)


@pytest.mark.gpu
def test_the_kernel_attends_as_the_mask_does() -> None:
    """Flash attention's lengths per row against the masked form in float32, with windows and grouped queries."""
    from rlhf_core.rollout.slots import _attend_flash

    draw = torch.Generator().manual_seed(0)
    for window, kv_heads, width in itertools.product((None, 3, 100), (1, 2, 8), (64, 128)):
        slots = Slots(700, torch.bfloat16, widest=512)
        slots.starts_R = torch.tensor([0, 7, 50, 400, 700], dtype=torch.int32, device="cuda")
        slots.lengths_R = torch.tensor([5, 1, 300, 299], dtype=torch.int32, device="cuda")
        slots.row_R = torch.arange(5, dtype=torch.int32, device="cuda")
        queries = torch.randn(4, 8, width, generator=draw).to("cuda", torch.bfloat16)
        keys, values = torch.randn(2, 700, kv_heads, width, generator=draw).to("cuda", torch.bfloat16)
        found = _attend_flash(slots, queries, keys, values, 0.1, window).float()
        expected = attend_masked(slots, queries.float(), keys.float(), values.float(), 0.1, window)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.gpu
def test_a_model_that_needs_the_host_keeps_the_other_sampler() -> None:
    """A mixture of experts asks how many tokens each expert has, unless its kernels do not."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    moe = MixtralForCausalLM(MixtralConfig(num_key_value_heads=1, num_local_experts=4, **sizes)).eval()
    moe = moe.to("cuda", torch.bfloat16)
    assert can_pack(moe)
    obstacle = file.slot_obstacle(moe, torch.bfloat16)
    assert obstacle == "" or "fails in such a step" in obstacle
