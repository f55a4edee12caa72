"""The decoding step on torch's device `meta`: nothing in it waits for the device, takes from the host, or copies weights.

Tensors of this device have shapes and no numbers, so that what needs a number on the host raises, as it does while a CUDA
graph is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rlhf_core import Sampling
from rlhf_core.rollout.slot_sampler import SlotSampler
from rlhf_core.rollout.step import Board, Next, Stepper, draw_next

V = 192
"""Tokens of the vocabulary, a multiple of a block of the draw."""

ROWS = 8
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": V,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "gpt2": GPT2Config(
        n_embd=64,
        n_inner=96,
        n_layer=2,
        n_head=4,
        vocab_size=V,
        n_positions=64,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=1,
    ),
}
SMALLEST = 64 * 32
"""Numbers of the smallest weight; everything else in a step of 8 rows is smaller, keys and values are larger."""


class NoHost(TorchDispatchMode):
    """Keeps the tensors that operations make, and raises where one crosses from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        given, made = (
            [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        assert {each.device.type for each in (*given, *made)} == {"meta"}, f"{call} takes from the host"
        places = {each.untyped_storage()._cdata for each in given}
        self.made += [(str(call), each) for each in made if each.untyped_storage()._cdata not in places]
        return result


class NoNumbers(TorchFunctionMode):
    """Raises where numbers of the host become a tensor: their copy waits."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert call not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), (
            "numbers of the host become a tensor"
        )
        return call(*args, **(kwargs or {}))


def step(model: Any, draw: Callable[..., Next] | None) -> list[tuple[str, torch.Tensor]]:
    """Run a step of 5 rows in a bucket of 8 as a graph records it; return operations and the tensors that they make."""
    sampler = SlotSampler(model, torch.bfloat16, cells=300, graphs=False)
    with sampler.open_slots(), torch.no_grad():
        for module in [each for each in model.modules() if hasattr(each, "is_causal")]:
            key = torch.zeros(1, 4 if model.config.model_type == "gpt2" else 2, 1, 16, device="meta")
            sampler.slots.layer(module, key, key)
        assert len(sampler.slots.layers) == 2
        board = Board(5, 12, sampler.slots, torch.tensor([3, 11]).to("meta"), model.device)
        with NoHost() as seen, NoNumbers():
            Stepper(board, sampler.step, draw, graphs=False)(ROWS, 64)
    return seen.made


def model_of(name: str) -> Any:
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).eval().to("meta")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_a_step_waits_for_nothing_and_copies_no_weights(name: str, temperature: float) -> None:
    """Float32 tensors of a real vocabulary cost as much as layers, so they are counted too."""
    lacking_L = torch.tensor([7, 9]).to("meta")
    made = step(model_of(name), partial(draw_next, sampling=Sampling(temperature=temperature), lacking_L=lacking_L))
    assert not [call for call, each in made if each.numel() >= SMALLEST]
    assert sum(call == "rlhf.attend_slots.default" for call, _ in made) == 2
    wide = [call for call, each in made if each.shape == (ROWS, V) and each.dtype == torch.float32]
    assert len(wide) <= 2, wide


def test_a_step_that_leaves_the_draw_to_the_host_waits_for_nothing() -> None:
    assert step(model_of("llama"), None)


def test_a_step_with_adapters_waits_for_nothing() -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen2"], dtype=torch.bfloat16).eval()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), model)
    model.to(torch.bfloat16)
    made = step(model.to("meta"), partial(draw_next, sampling=Sampling(), lacking_L=torch.zeros(0).long().to("meta")))
    assert not [call for call, each in made if each.numel() >= SMALLEST]


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a number": lambda logits_RV: float(logits_RV.max()),
    "a branch": lambda logits_RV: 1 if (logits_RV > 0).any() else 0,
    "places": lambda logits_RV: (logits_RV > 0).nonzero(),
    "a selection": lambda logits_RV: logits_RV[logits_RV > 0],
    "a copy": lambda logits_RV: logits_RV.cpu(),
    "the host's numbers": lambda logits_RV: torch.tensor([1.0], device=logits_RV.device),
    "the host's tensor": lambda logits_RV: logits_RV.new_tensor([1.0]) + logits_RV,
}


@pytest.mark.parametrize("name", WAITS)
def test_a_step_that_waits_is_found_out(name: str) -> None:
    """Each of these fails while a graph is recorded."""

    def draw(logits_RV: torch.Tensor, uniforms_R: torch.Tensor) -> Next:
        WAITS[name](logits_RV)
        return Next(logits_RV.argmax(-1), uniforms_R)

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        step(model_of("llama"), draw)
