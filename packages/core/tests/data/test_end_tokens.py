"""End tokens of a turn: one set for training rows, sampling, metrics and the saved folder."""

from __future__ import annotations

import pytest
from families import FAMILIES, TEMPLATES, family, user

from rlhf_core.contract.batch import Example
from rlhf_core.contract.episode import Feedback
from rlhf_core.data.encoder import Encoder
from rlhf_core.models.loading.end_tokens import find_end_tokens, template_end

ENDS = {
    "gpt-2": ["<|endoftext|>"],
    "qwen": ["<|im_end|>", "<|endoftext|>"],
    "qwen thinking": ["<|im_end|>", "<|endoftext|>"],
    "llama-3": ["<|eot_id|>", "<|end_of_text|>"],
    "llama-2": ["</s>"],
    "llama base": ["</s>"],
    "zephyr": ["</s>"],
    "mistral": ["</s>"],
    "phi-3": ["<|end|>", "<|endoftext|>"],
    "gemma": ["<end_of_turn>", "<eos>"],
    "gpt-oss": ["<|return|>", "<|endoftext|>"],
    "answers": ["<|im_end|>", "<|endoftext|>"],
    "glm": ["<|endoftext|>"],
}
"""What ends a completion in each family, as its makers say."""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_s_end_of_turn_and_eos_end_completions_and_nothing_else_does(name: str) -> None:
    tokenizer = family(name)
    assert tokenizer.convert_ids_to_tokens(find_end_tokens(tokenizer, ())) == ENDS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_turn_stops_at_the_first_token_that_ends_sampling(name: str) -> None:
    encoder = Encoder(family(name))
    row = encoder.row(Example("What is it?", ("It is so.",)))
    (side,) = row.completions
    assert [i for i, number in enumerate(side.ids) if number in encoder.ends] == [len(side.ids) - 1]
    assert all(side.mask)


def test_listed_tokens_count_unless_they_are_ordinary_or_open_a_turn() -> None:
    """A default `eos_token_id: 2` of a config whose tokenizer is another names some word; Phi 3 lists its `<|assistant|>`."""
    tokenizer = family("phi-3")
    ordinary = tokenizer.encode("a", add_special_tokens=False)[-1]
    opener, other = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|user|>"])
    found = find_end_tokens(tokenizer, (), [ordinary, opener, other, 10**6])
    assert tokenizer.convert_ids_to_tokens(found) == ["<|end|>", "<|endoftext|>", "<|user|>"]


def test_the_template_in_force_counts_beside_the_tokenizer_s_own() -> None:
    tokenizer = family("llama-3")
    assert template_end(tokenizer, TEMPLATES["zephyr"]) == tokenizer.eos_token_id
    found = tokenizer.convert_ids_to_tokens(find_end_tokens(tokenizer, (TEMPLATES["zephyr"],)))
    assert found == ["<|end_of_text|>", "<|eot_id|>"]
    assert find_end_tokens(tokenizer, (None,)) == find_end_tokens(tokenizer, ())


def test_a_template_of_parts_and_one_that_refuses_every_chat_are_read_too() -> None:
    tokenizer = family("qwen")
    parts = TEMPLATES["chatml"].replace("m.content", "m.content[0].text")
    assert tokenizer.convert_ids_to_tokens(template_end(tokenizer, parts)) == "<|im_end|>"
    assert template_end(tokenizer, "{{ raise_exception('no') }}") is None


def test_a_completion_with_another_special_token_at_its_end_still_gets_its_end() -> None:
    """`</think>` ends a thought, not a turn; an end token in the row's own text is not doubled."""
    encoder = Encoder(family("qwen thinking"))
    raw = Encoder(family("qwen thinking"), encoding=encoder.encoding.__class__(template="raw"))
    spell = encoder.tokenizer.decode
    assert spell(raw.row(Example("Hi", ("no</think>",))).completions[0].ids) == "no</think><|endoftext|>"
    assert spell(raw.row(Example("Hi", ("no<|im_end|>",))).completions[0].ids) == "no<|im_end|>"
    assert spell(encoder.row(Example("Hi", ("no<|im_end|>",))).completions[0].ids) == "no<|im_end|>"


def test_feedback_does_not_repeat_an_end_that_opens_the_next_turn() -> None:
    """GLM's generation config lists `<|user|>`."""
    tokenizer = family("glm")
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    encoder = Encoder(tokenizer, listed_ends=[end])
    turn = [*tokenizer.encode("Yes."), end]
    ids = encoder.feedback(Example("Hi"), Feedback(messages=user("Why?")), turn)
    assert tokenizer.decode([*turn, *ids]) == "Yes.<|user|>\nWhy?<|assistant|>\n"
