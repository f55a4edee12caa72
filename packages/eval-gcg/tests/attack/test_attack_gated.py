"""Gated layers of a packed pass write into their own results, and give the bits of the model's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_attacks import SIZE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf_eval_gcg.attack.gated_layers import gated_layers, in_place
from rlhf_eval_gcg.attack.victim import Victim

VOCAB = 64


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def llama() -> Any:
    return model_of(LlamaConfig(vocab_size=VOCAB, initializer_range=0.4, **SIZE))


class Results(TorchDispatchMode):
    """Collects results of a number of cells, so that each keeps its memory."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.cells:
            self.found.append(result)
        return result


@pytest.mark.parametrize(
    "config", [LlamaConfig(vocab_size=VOCAB, **SIZE), Gemma3TextConfig(vocab_size=VOCAB, head_dim=8, **SIZE)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_layers_to_the_bit(config: Any, dtype: torch.dtype) -> None:
    layers = gated_layers(model_of(config).to(dtype))
    assert len(layers) == config.num_hidden_layers
    x = 3 * torch.randn(1, 7, config.hidden_size, dtype=dtype)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        with in_place(layers):
            found = [layer(x) for layer in layers]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_no_result_is_made_but_those_of_the_two_products() -> None:
    (layer, *_) = layers = gated_layers(llama())
    x = torch.randn(1, 7, SIZE["hidden_size"])
    counts = []
    for chosen in ([], layers):
        with torch.no_grad(), in_place(chosen), Results(7 * SIZE["intermediate_size"]) as results:
            layer(x)
        counts.append(len({each.untyped_storage().data_ptr() for each in results.found}))
    assert counts == [4, 2]


def test_layers_get_their_forward_back_after_an_error() -> None:
    layers = gated_layers(llama())
    with pytest.raises(RuntimeError, match="out of memory"), in_place(layers):
        assert all("forward" in vars(each) for each in layers)
        raise RuntimeError("out of memory")
    assert not any("forward" in vars(each) for each in layers)


class DoubledMLP(LlamaMLP):
    """A layer with the same submodules and another formula."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_layers_of_other_forms_stay_as_they_are() -> None:
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert gated_layers(model_of(gpt2)) == []
    model = llama()
    first, second = (layer.mlp for layer in model.model.layers)
    model.model.layers[0].mlp = DoubledMLP(model.config)
    assert gated_layers(model) == [second]
    model.model.layers[0].mlp = first
    second.forward = second.forward  # as libraries do that move weights between devices
    assert gated_layers(model) == [first]


def test_models_without_packed_passes_use_none() -> None:
    model = llama()
    assert len(Victim(model)._gated) == SIZE["num_hidden_layers"]
    assert Victim(model, prefix_cache=False)._gated == []
