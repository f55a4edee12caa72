"""Rows end to end without padding give what padded rows give: every output and every gradient, on several architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs import packed_attention
from rlhf_core.models.inputs import packing as packed_file
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading.byte_tokenizer import EOS, PAD, TOKENS, byte_tokenizer
from rlhf_core.models.module import RoleModule

LENGTHS = [(3, 5), (7, 1), (1, 4), (2, 0), (4, 9), (4, 9), (5, 3)]
"""Prompt and completion tokens of each row: an empty completion, equal rows side by side, equal sums elsewhere."""

ALL = frozenset({"logprobs_NT", "entropy_NT", "values_NT", "scores_N"})

TOKENS_OF = {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, **TOKENS_OF}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(sliding_window=4, **SIZES),
    "qwen2": Qwen2Config(use_sliding_window=True, **MIXED, **SIZES),
    "qwen3": Qwen3Config(head_dim=8, **SIZES),
    "gemma2": Gemma2Config(final_logit_softcapping=0.5, attn_logit_softcapping=None, head_dim=8, **MIXED, **SIZES),
    "gemma3": Gemma3TextConfig(head_dim=8, **MIXED, **SIZES),
    "gpt2": GPT2Config(attn_pdrop=0.5, n_embd=32, n_layer=2, n_head=4, **TOKENS_OF),
}


def spec(model: str, *outputs: str, trained: bool = True, **options: Any) -> RoleSpec:
    made = (TrainedOptions if trained else ModelOptions)(model=model, **options)
    return RoleSpec("actor", made, frozenset(outputs), terms=(("data", None),) if trained else ())  # type: ignore[arg-type]


def checkpoint(config: Any, path: Path, scale: float = 0.3) -> str:
    """A random model of an architecture, with weights large enough for attention to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, scale)
        model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def rows(lengths: list[tuple[int, int]] = LENGTHS) -> Batch:
    draw = torch.Generator().manual_seed(0)
    L, T = (max(pair[i] for pair in lengths) for i in (0, 1))
    N = len(lengths)
    prompt_lengths_N, lengths_N = (torch.tensor([pair[i] for pair in lengths]) for i in (0, 1))
    prompt_NL, tokens_NT = (torch.randint(5, 250, (N, width), generator=draw) for width in (L, T))
    mask_NT = torch.arange(T) < lengths_N[:, None]
    texts = [""] * N
    return Batch(
        texts, texts, prompt_NL, prompt_lengths_N, tokens_NT, lengths_N, mask_NT, torch.arange(N), [None] * N, [{}] * N
    )


def results(module: RoleModule, batch: Batch, names: frozenset[str] = ALL) -> dict[str, Tensor]:
    """Outputs, and the gradients of a sum of them with random weights."""
    module.zero_grad()
    outputs = module(arrange_inputs(batch), names)
    draw = torch.Generator().manual_seed(1)
    sum((outputs[name] * torch.randn(outputs[name].shape, generator=draw)).sum() for name in sorted(names)).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()} | gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_give_the_outputs_and_gradients_of_padded_rows(name: str, tmp_path: Path) -> None:
    """Windows shorter than rows, layers of two kinds, soft caps, grouped queries, positions that are learned."""
    folder = checkpoint(CONFIGS[name], tmp_path)
    packed, padded = (build_module(spec(folder, *ALL, packing=packing)) for packing in (True, False))
    assert (packed.packs, padded.packs) == (True, False)
    found, expected = (results(module, rows()) for module in (packed, padded))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            found[key] / scale, value / scale, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_no_padding_reaches_the_model() -> None:
    """The body sees one row of as many tokens as there are, whatever the widest is."""
    module, widths = build_module(spec("tiny", "logprobs_NT")), []
    module.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda _, given: widths.append(tuple(given[0].shape[:2]))
    )
    module(arrange_inputs(rows()), frozenset({"logprobs_NT"}))
    assert widths == [(1, sum(a + b for a, b in LENGTHS))]


def test_one_row_alone_and_rows_of_one_token_are_packed_too() -> None:
    """Attention over a single token has no causal mask to take; the longest of one row is its length."""
    for lengths in ([(1, 0)], [(1, 0), (1, 0)], [(5, 3)], [(1, 1), (1, 0), (1, 0)]):
        packed, padded = (build_module(spec("tiny", *ALL, packing=packing)) for packing in (True, False))
        for name in ALL:
            found, expected = (module(arrange_inputs(rows(lengths)), ALL)[name] for module in (packed, padded))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_recomputed_activations_keep_rows_apart() -> None:
    """Gradient checkpointing attends a second time, in the backward pass."""
    plain, recomputed = (build_module(spec("tiny", *ALL, gradient_checkpointing=each)) for each in (False, True))
    found, expected = results(recomputed, rows()), results(plain, rows())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_an_architecture_that_mixes_rows_stays_padded(tmp_path: Path) -> None:
    """LFM2 has convolutions over time, which do not know where a row ends."""
    folder = checkpoint(Lfm2Config(layer_types=["conv", "full_attention"], **SIZES), tmp_path)
    module = build_module(spec(folder, "logprobs_NT", trained=False))
    assert not module.packs
    assert module.model.config._attn_implementation == "sdpa"


def test_eager_attention_stays_padded() -> None:
    assert not build_module(spec("tiny", "logprobs_NT", attention="eager")).packs


def test_a_model_that_raises_on_packed_rows_stays_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(packed_file.PackedRows, "arguments", refuse)
    assert not build_module(spec("tiny", "logprobs_NT")).packs


def test_what_is_saved_does_not_name_the_attention(tmp_path: Path) -> None:
    module = build_module(spec("tiny", "logprobs_NT"))
    module.causal_lm.save_pretrained(tmp_path)
    assert packed_attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.gpu
def test_flash_attention_gives_what_padded_rows_give() -> None:
    """In bfloat16, on a GPU with flash-attn: its variable-length rows against those of torch's kernel."""
    pytest.importorskip("flash_attn")
    batch, found = rows([(40, 60), (70, 10), (10, 0), (5, 200)]), {}
    for attention in ("flash_attention_2", "sdpa"):
        module = build_module(spec("tiny", *ALL, attention=attention, dtype="bfloat16")).cuda()
        assert module.packs
        with torch.autocast("cuda", torch.bfloat16):
            found[attention] = module(arrange_inputs(batch).to("cuda"), ALL)
    for name in ALL:
        torch.testing.assert_close(found["flash_attention_2"][name], found["sdpa"][name], rtol=0, atol=0.05)
