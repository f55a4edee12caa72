"""Architectures that need another attention get it by themselves, and what cannot be trained is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import rows, spec
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    BloomConfig,
    DeepseekV3Config,
    GPTJConfig,
    GptOssConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MptConfig,
    XLMConfig,
)

from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading.byte_tokenizer import EOS, PAD, TOKENS, byte_tokenizer

LOGPROBS = frozenset({"logprobs_NT"})

TOKENS_OF = {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS_OF}
EXPERTS = {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}

WITHOUT_SDPA = {
    "gpt_oss": GptOssConfig(head_dim=8, sliding_window=4, **EXPERTS, **SIZES),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TOKENS_OF),
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **TOKENS_OF),
    "mpt": MptConfig(d_model=32, n_layers=2, n_heads=4, **TOKENS_OF),
}


def save(config: Any, folder: Path) -> str:
    """Write a random model of the architecture; its weights are large enough to tell right from wrong."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def difference(folder: str) -> float:
    """The largest difference of the rows' log-probabilities from those of transformers, row by row in eager attention."""
    batch, single = rows()
    found = build_module(spec("logprobs_NT", model=folder))(arrange_inputs(batch), LOGPROBS)["logprobs_NT"]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    worst = 0.0
    for n, (prompt, completion) in enumerate(single):
        ids_1S = torch.cat([prompt, completion])[None]
        logits_SV = plain(input_ids=ids_1S, use_cache=False).logits[0, :-1]
        logprobs_S = logits_SV.log_softmax(-1).gather(1, ids_1S[0, 1:, None]).squeeze(1)
        expected_T = logprobs_S[len(prompt) - 1 :]
        worst = max(worst, *(found[n, : len(completion)] - expected_T).abs().tolist(), 0.0)
    return worst


@pytest.mark.parametrize("name", sorted(WITHOUT_SDPA))
def test_what_has_no_sdpa_computes_with_eager_and_says_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(WITHOUT_SDPA[name], tmp_path)
    assert difference(folder) < 1e-4
    said = [line for line in capsys.readouterr().err.splitlines() if "transformers has no sdpa for" in line]
    assert len(said) == 1
    assert said[0].endswith("so it uses eager attention")


def test_llama_4s_text_model_is_trained_though_its_body_has_another_name(tmp_path: Path) -> None:
    sizes = {**EXPERTS, **SIZES, "head_dim": 8, "intermediate_size_mlp": 32, "attention_chunk_size": 4}
    folder = save(Llama4TextConfig(**sizes), tmp_path)
    assert difference(folder) < 1e-4


def test_layers_that_attend_within_chunks_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens do not show it: rows are longer than a chunk of four, which is in a mask. Also if it had flash attention."""
    monkeypatch.setattr(Llama4ForCausalLM, "_supports_flash_attn", True)
    sizes = {**EXPERTS, **SIZES, "head_dim": 8, "intermediate_size_mlp": 32, "attention_chunk_size": 4}
    folder = save(Llama4TextConfig(**sizes), tmp_path)
    assert not build_module(spec("logprobs_NT", model=folder)).packs
    assert difference(folder) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        XLMConfig(emb_dim=32, n_layers=2, n_heads=4, n_words=TOKENS, eos_index=EOS, pad_index=PAD),
        BertGenerationConfig(intermediate_size=32, **SIZES),
    ],
    ids=["xlm", "bert-generation"],
)
def test_a_model_that_reads_later_tokens_is_refused(config: Any, tmp_path: Path) -> None:
    """transformers lists both among causal language models; neither is one unless its configuration says so."""
    with pytest.raises(UsageError, match="is not a causal language model: its output for a token depends on later"):
        build_module(spec("logprobs_NT", model=save(config, tmp_path)))


def test_a_model_that_cannot_compute_is_one_line(tmp_path: Path) -> None:
    """Heads of queries and values that do not fit one another: transformers raises from the middle of its layers."""
    wrong = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = DeepseekV3Config(head_dim=8, first_k_dense_replace=2, n_group=1, topk_group=1, **wrong, **SIZES)
    with pytest.raises(UsageError, match=r"\(DeepseekV3ForCausalLM\) fails in a forward pass of 4 tokens: The size"):
        build_module(spec("logprobs_NT", model=save(config, tmp_path)))
