"""RMS norms as one operation: the same numbers, in the modules whose norm it is and in no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rollout_sampler import llama, sliding
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from rlhf_core import Sampling
from rlhf_core.rollout.fused_norms import find_norms, fuse_norms
from rlhf_core.rollout.slot_sampler import SlotSampler

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


@pytest.mark.parametrize(("make", "count"), [(llama, 5), (sliding, 5), (qwen3, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_give_their_formula_in_one_operation(make: Any, count: int, dtype: torch.dtype) -> None:
    """In float64: a state by the root of its mean square and eps, times the weight."""
    model = make()
    for each, _ in find_norms(model):
        torch.nn.init.uniform_(each.weight, 0.5, 2)
    model.to(dtype)
    norms = find_norms(model)
    assert len(norms) == count
    for module, eps in norms:
        states = torch.randn(3, 2, len(module.weight), dtype=torch.float64).mul(1e-3).to(dtype)
        wide = states.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight.double()
        with fuse_norms(norms), torch.no_grad():
            found = module(states)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-6)
        assert "forward" not in vars(module)


def test_a_model_with_fused_norms_gives_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every norm is called once as the operation; with states of another dtype, or more inputs, the module itself is."""
    model, ids = llama(), torch.tensor([[5, 6, 7, 8]])
    calls, real = [], torch.nn.functional.rms_norm
    norms = find_norms(model)
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *given: calls.append(1) or real(*given))
        with fuse_norms(norms):
            found = model(ids).logits
            assert len(calls) == 5
            narrow = torch.ones(1, 32, dtype=torch.bfloat16)
            others = model.model.norm(narrow), model.model.norm(hidden_states=narrow.float())
    assert len(calls) == 5
    assert torch.equal(others[0], model.model.norm(narrow))
    assert torch.equal(others[1], model.model.norm(narrow.float()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_norms_stay_as_they_are() -> None:
    """Gemma's weight counts from one; GPT-2 subtracts a mean; what has a forward of its own keeps it."""
    assert find_norms(GemmaForCausalLM(GemmaConfig(**SIZES)).eval()) == []
    assert find_norms(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40)).eval()) == []
    model = llama()
    model.model.norm.forward = model.model.norm.forward
    assert model.model.norm not in [module for module, _ in find_norms(model)]


def test_steps_fuse_norms_and_prompts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read as in training. A compiler is left what it can fuse with more."""
    calls, real = [], torch.nn.functional.rms_norm
    model = llama()
    sampler = SlotSampler(model, torch.float32, flash=False, graphs=False)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *given: calls.append(1) or real(*given))
    sampler([[5, 6], [7]], Sampling(n=1, max_new_tokens=4), [[0], [1]], eos_ids=())
    assert len(calls) == 3 * 5, "four tokens of two rows take three steps"
    assert SlotSampler(model, torch.float32, flash=False, graphs=False, compile_steps=True)._norms == []
