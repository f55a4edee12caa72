"""The boundary of prompt and completion, over families of tokenizers: the ids of the whole text are the measure."""

from __future__ import annotations

from typing import Any

import pytest
from families import FAMILIES, TEMPLATES, family, user
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.contract.batch import Example
from rlhf_core.contract.episode import Feedback
from rlhf_core.data.boundary import TextTokenizer
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.errors import DataError

QUESTION, ANSWER = "What is the capital of France?", "Paris. Yes, Paris!"
CHATS = [name for name, kind in FAMILIES.items() if kind[3]]


def joined(row: Any, side: int = 0) -> list[int]:
    return [*row.ids, *row.completions[side].ids]


@pytest.mark.parametrize("name", CHATS)
def test_prompt_and_completion_are_the_ids_of_the_whole_chat(name: str) -> None:
    tokenizer = family(name)
    row = Encoder(tokenizer).row(Example(QUESTION, (ANSWER, "No.")))
    for side, answer in enumerate((ANSWER, "No.")):
        chat = [*user(QUESTION), {"role": "assistant", "content": answer}]
        opener = "<think>\n" if name == "qwen thinking" else ""
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        text = text.replace(f"assistant\n{answer}", f"assistant\n{opener}{answer}")
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = joined(row, side)
        glm = [tokenizer.eos_token_id] if name == "glm" else []
        assert found == [*expected, *glm][: len(found)]
        assert found[-1] in Encoder(tokenizer).ends
        assert tokenizer.decode(row.completions[side].ids, skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("answer", [" Paris.", "Paris.", "\n\nParis", "12"])
def test_raw_text_has_the_ids_of_the_whole_text_with_one_bos_and_one_end(name: str, answer: str) -> None:
    tokenizer = family(name)
    for template in ("raw", "chat"):
        if template == "chat":
            row = Encoder(tokenizer).row(Example("", (f"Answer:{answer}",)))  # pre-training text is no chat
            bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            first = [] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else [bos]
        else:
            row, first = Encoder(tokenizer, encoding=Encoding(template="raw")).row(Example("Answer:", (answer,))), []
        assert joined(row) == [*first, *tokenizer(f"Answer:{answer}")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("name", FAMILIES)
@given(before=st.text("aP .\n<", max_size=5), text=st.text("aP .\nü", max_size=5))
def test_what_follows_reads_as_it_was_written(name: str, before: str, text: str) -> None:
    tokenizer = family(name)
    texts = TextTokenizer(tokenizer)
    first, rest = texts.ids(before), texts.following(before, text)
    plain = tokenizer.decode([*texts.ids("a"), *first, *rest]).removeprefix("a").removeprefix(" ")
    assert plain.lstrip(" ") == (before + text).lstrip(" ")
    assert tokenizer.decode([*texts.ids("a"), *texts.piece(text)]) == f"a{text}"


def test_a_prompt_that_ends_with_a_blank_keeps_its_ids_and_no_blank_is_added() -> None:
    """`Answer: ` ends with a token that the whole text would not have; sampling continues it all the same."""
    for name in ("gpt-2", "llama base"):
        tokenizer = family(name)
        row = Encoder(tokenizer).row(Example("Answer: ", ("Paris",)))
        assert row.ids == tokenizer("Answer: ")["input_ids"]
        assert tokenizer.decode(joined(row), skip_special_tokens=True).strip() == "Answer: Paris"


# ----------------------------------------------------------------------------------------------------------------------
# BOS
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "gemma", "phi-3", "zephyr"])
def test_text_that_was_rendered_before_has_one_bos_which_is_not_learnt(name: str) -> None:
    tokenizer = family(name)
    bos, encoder = tokenizer.bos_token, Encoder(tokenizer, encoding=Encoding(template="raw"))
    prompt = encoder.row(Example(f"{bos}Question:", (" Paris",)))
    assert joined(prompt) == [*tokenizer("Question: Paris")["input_ids"], tokenizer.eos_token_id]
    text = encoder.row(Example("", (f"{bos}Question: Paris",)))
    assert joined(text) == joined(prompt)
    assert text.ids == [tokenizer.bos_token_id]
    assert encoder.row(Example("", ("Question: Paris",))).ids == text.ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_is_cut_keeps_its_bos_and_the_opening_of_its_chat(name: str) -> None:
    tokenizer = family(name)
    long = "Yes. No. " * 60
    whole = Encoder(tokenizer).prompt_row(Example(long)).ids
    encoder = Encoder(tokenizer, 60, Encoding(too_long="truncate"))
    cut = encoder.truncate(encoder.prompt_row(Example(long)))
    assert cut is not None and cut.cut and len(cut.ids) == 60
    opening = next(i for i in range(60) if cut.ids[i:] == whole[len(whole) - 60 + i :])
    assert cut.ids[:opening] == whole[:opening]
    opens = (TEMPLATES[FAMILIES[name][3]] if FAMILIES[name][3] else "").partition("{{ m.content")[0]
    text = tokenizer.decode(cut.ids[:opening])
    assert text.startswith(tokenizer.bos_token or "") or not opens.count("bos_token")
    assert ("user" in text or "[INST]" in text) == bool(FAMILIES[name][3])
    short = Encoder(tokenizer, opening, Encoding(too_long="truncate"))  # no room for more than the opening
    least = short.truncate(short.prompt_row(Example(long)))
    bos = int(whole[0] == tokenizer.bos_token_id and opening > 1)
    assert least is not None and least.ids == [*whole[:bos], *whole[len(whole) - opening + bos :]]


# ----------------------------------------------------------------------------------------------------------------------
# answers that are begun, thoughts, and templates that say less
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(
    ("begun", "rest"), [("The capital", " is Paris."), ("The capital ", "is Paris."), ("Pa", "ris.")]
)
def test_a_prompt_that_ends_with_the_beginning_of_the_answer_is_continued(name: str, begun: str, rest: str) -> None:
    tokenizer = family(name)
    chat = (*user(QUESTION), {"role": "assistant", "content": begun})
    encoder = Encoder(tokenizer)
    row = encoder.row(Example(chat, (rest,)))
    assert encoder.prompts([Example(chat)], [0]).token_ids == [row.ids]
    whole = [*user(QUESTION), {"role": "assistant", "content": begun + rest}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    read = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (read + tokenizer.eos_token * (name == "glm")).startswith(tokenizer.decode(joined(row)))
    assert row.completions[0].ids[-1] in encoder.ends
    assert row.text.rstrip().endswith(begun.strip())


def test_a_begun_answer_in_a_dialogue_without_template_is_continued_too() -> None:
    tokenizer = family("gpt-2")
    chat = (*user("Hi?"), {"role": "assistant", "content": "Yes"})
    row = Encoder(tokenizer).row(Example(chat, (", sure.",)))
    assert tokenizer.decode(joined(row)) == "\n\nHuman: Hi?\n\nAssistant: Yes, sure.<|endoftext|>"
    tools = ({"role": "assistant", "content": None, "tool_calls": []},)
    with pytest.raises(DataError, match="rows:1: the prompt ends with an assistant message, so it and the answer"):
        Encoder(family("qwen")).row(Example(chat, (tools,), origin="rows:1"))


def test_a_thought_that_the_prompt_opens_is_continued_by_an_answer_that_begins_with_it() -> None:
    """Past turns are shown without their thoughts, so the text of the row is where it stands whole."""
    encoder = Encoder(family("qwen thinking"))
    for answer in ("<think>\nLet me see.</think>Yes.", "Let me see.</think>Yes."):
        row = encoder.row(Example(QUESTION, (answer,)))
        assert row.text.endswith("<|im_start|>assistant\n<think>\n")
        assert encoder.tokenizer.decode(row.completions[0].ids) == "Let me see.</think>Yes.<|im_end|>"
        whole = encoder.tokenizer(row.text + "Let me see.</think>Yes.<|im_end|>")["input_ids"]
        assert joined(row) == whole


@pytest.mark.parametrize("answer", ["end", "im", "_", "|"])
def test_a_short_answer_is_not_found_inside_of_the_end_token(answer: str) -> None:
    encoder = Encoder(family("qwen thinking"))
    row = encoder.row(Example(QUESTION, (answer,)))
    assert encoder.tokenizer.decode(row.completions[0].ids) == f"{answer}<|im_end|>"


def test_feedback_follows_a_turn_without_a_blank_of_the_tokenizer_s_own() -> None:
    for name in ("llama-2", "mistral", "zephyr", "gemma", "qwen"):
        encoder = Encoder(family(name))
        ids = encoder.feedback(Example(QUESTION), Feedback("=Paris"), encoder.tokenizer.encode("a"))
        assert encoder.tokenizer.decode([*encoder.tokenizer.encode("a", add_special_tokens=False), *ids]) == "a=Paris"


@pytest.mark.parametrize("name", ["llama-2", "mistral", "zephyr", "llama-3", "gemma", "qwen", "phi-3"])
def test_an_episode_s_feedback_has_the_ids_of_the_whole_chat(name: str) -> None:
    encoder, tokenizer = Encoder(family(name)), family(name)
    example = Example(QUESTION, (ANSWER,))
    row = encoder.row(example)
    ids = encoder.feedback(example, Feedback(messages=user("Why?")), row.completions[0].ids)
    chat = [*user(QUESTION), {"role": "assistant", "content": ANSWER}, *user("Why?")]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert [*joined(row), *ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
