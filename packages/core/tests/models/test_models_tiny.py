"""`tiny` and its byte-level tokenizer: the same everywhere, ordinary for transformers, strict about its settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core.contract.options import ModelOptions
from rlhf_core.errors import UsageError
from rlhf_core.models.loading.byte_tokenizer import EOS, byte_tokenizer
from rlhf_core.models.loading.load import load_model, load_scorer
from rlhf_core.models.loading.tokenizer import load_tokenizer, render_chat

TOKENIZER = byte_tokenizer()
OPTIONS = ModelOptions()


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_becomes_its_bytes_and_comes_back(text: str) -> None:
    """Characters of every plane, blanks at both ends, control characters."""
    ids = TOKENIZER(text)["input_ids"]
    if "<|" not in text:
        assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_are_single_tokens_and_can_be_left_out() -> None:
    ids = TOKENIZER("<|im_start|>user\nhi<|im_end|>")["input_ids"]
    assert ids == [257, *b"user\nhi", 258]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (258, 256)


def test_a_chat_is_rendered_in_the_chatml_manner() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert render_chat(TOKENIZER, chat[:1]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(TOKENIZER, chat, generation=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )


def test_a_tokenizer_without_a_template_says_what_to_pass() -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(UsageError, match="no chat template: use an instruction-tuned model"):
        render_chat(bare, [{"role": "user", "content": "hi"}])


def test_the_weights_depend_on_the_name_alone_and_leave_the_random_state_untouched() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_model("tiny", OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = load_model("tiny", OPTIONS), load_model("tiny:seed=1", OPTIONS)
    scorer, _ = load_scorer("tiny", OPTIONS)
    weights = dict(first.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.named_parameters())
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in scorer.named_parameters() if name != "score.weight"
    )
    assert not torch.equal(weights["model.embed_tokens.weight"], other.lm_head.weight)
    spread = weights["model.embed_tokens.weight"].std().item()
    assert spread == pytest.approx(0.02, rel=0.05)


def test_a_saved_tiny_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """Plain transformers loads it, answers the same, and its tokenizer too."""
    model, tokenizer = load_model("tiny", OPTIONS), load_tokenizer("tiny", OPTIONS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = render_chat(tokenizer, [{"role": "user", "content": "naïve 日本 🙂"}])
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert words(text)["input_ids"] == ids[0].tolist()
    assert words.decode(ids[0]) == text
    assert words.chat_template == tokenizer.chat_template
    assert (words.eos_token_id, words.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.generation_config.eos_token_id == EOS


def test_settings_change_the_size() -> None:
    model = load_model("tiny:layers=3,hidden=32,heads=2,kv_heads=1,intermediate=40,vocab=300,context=128", OPTIONS)
    embedding, attention, mlp = 300 * 32, 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 40
    assert sum(p.numel() for p in model.parameters()) == embedding + 3 * (attention + mlp + 2 * 32) + 32
    tokenizer = load_tokenizer("tiny:vocab=300,context=128", OPTIONS)
    assert len(tokenizer) == 300
    assert tokenizer.model_max_length == 128
    assert tokenizer.decode([299]) == "<|299|>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny:hiden=32", r"no setting 'hiden' \(did you mean 'hidden'\?\)"),
        ("tiny:hidden", "hidden must be a positive whole number"),
        ("tiny:hidden=-4", "hidden must be a positive whole number"),
        ("tiny:layers=0", "layers must be a positive whole number"),
        ("tiny:hidden=66", r"hidden \(66\) must be an even multiple of heads \(2\)"),
        ("tiny:kv_heads=3", r"heads \(2\) must be a multiple of kv_heads \(3\)"),
        ("tiny:vocab=100", "vocab must be at least 259"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_tokenizer(name, OPTIONS)
    assert "\n" not in str(caught.value)
