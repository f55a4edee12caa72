"""Feedback in a chat: what follows a sampled turn is what the template writes after such a turn."""

from __future__ import annotations

import pytest

from rlhf_core.contract.batch import Example
from rlhf_core.contract.episode import Feedback
from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.errors import DataError
from rlhf_core.models.loading.tokenizer import load_tokenizer

TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = "{% for m in messages[-1:] %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
"""A template that shows the last message alone."""
EXAMPLE = Example(({"role": "user", "content": "2+2?"},), origin="rows.jsonl:1")
ANSWER = Feedback(messages=({"role": "user", "content": "Sure?"},))


def encoder(template: str | None) -> Encoder:
    tokenizer = load_tokenizer("tiny", ModelOptions())
    tokenizer.chat_template = template
    return Encoder(tokenizer)


def test_a_whole_chat_is_prompt_turn_and_feedback_joined() -> None:
    """The ids of an episode equal those of the whole chat, tokenized at once: bytes have no merges."""
    mine = encoder(TURNS)
    prompt, turn = mine.prompt_row(EXAMPLE).ids, [*b"4", mine.tokenizer.eos_token_id]
    chat = [*EXAMPLE.prompt, {"role": "assistant", "content": "4"}, *ANSWER.messages]
    whole = mine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = mine.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*prompt, *turn, *mine.feedback(EXAMPLE, ANSWER, turn)] == expected


def test_a_turn_that_was_cut_is_closed_first() -> None:
    mine = encoder(TURNS)
    turn = [*b"4"]
    ids = mine.feedback(EXAMPLE, ANSWER, turn)
    assert ids == [mine.tokenizer.eos_token_id, *b"\n<|user|>Sure?", mine.tokenizer.eos_token_id, *b"\n<|assistant|>"]


def test_without_a_template_messages_are_a_dialogue() -> None:
    mine = encoder(None)
    assert bytes(mine.feedback(Example("2+2?"), ANSWER, [52])) == b"\n\nHuman: Sure?\n\nAssistant:"


def test_text_and_token_ids_are_appended_as_they_are() -> None:
    mine = encoder(TURNS)
    assert mine.feedback(EXAMPLE, Feedback("=4"), [52]) == [*b"=4"]
    assert mine.feedback(EXAMPLE, Feedback(token_ids=(7, 8)), [52]) == [7, 8]
    assert mine.feedback(EXAMPLE, Feedback(), [52]) == []


def test_a_template_that_rewrites_what_was_sampled_is_fine_where_the_rest_follows_it() -> None:
    """As reasoning models' do: thoughts of earlier turns are left out, and the sampled tokens keep them."""
    thoughtful = TURNS.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}",
    )
    plain, odd = encoder(TURNS), encoder(thoughtful)
    assert odd.feedback(EXAMPLE, ANSWER, [52]) == plain.feedback(EXAMPLE, ANSWER, [52])


def test_a_template_that_forgets_the_turn_is_refused() -> None:
    with pytest.raises(DataError, match="rows.jsonl:1: the chat template does not render messages that follow"):
        encoder(FORGETFUL).feedback(EXAMPLE, ANSWER, [52])


def test_the_encoding_decides_as_for_prompts() -> None:
    tokenizer = load_tokenizer("tiny", ModelOptions())
    tokenizer.chat_template = TURNS
    raw = Encoder(tokenizer, encoding=Encoding(template="raw"))
    assert bytes(raw.feedback(EXAMPLE, ANSWER, [52])) == b"\n\nHuman: Sure?\n\nAssistant:"
