"""Training reads exactly the ids that sampling would have seen and produced, and the loss applies to its words.

The tokenizer is a byte-level BPE trained here. Special tokens never merge with text, so tokenizing a whole rendered
conversation at once is an independent account of what the joined prompt and completion ids must be.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_core.contract.batch import Example
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.errors import DataError, UsageError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
END_OF_TURN_APART_FROM_EOS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot|>", "<pad>"]
TEXT = [
    "What is the colour of the sky over the sea? It is blue, and the colour of the sea is blue too.",
    "Hello there.",
]
SKY = Example("What colour is the sky?", ("It is blue.", "Grün, I think: 🙂"), origin="rows.jsonl:1")


def tokenizer(template: str | None = CHATML, eos: str | None = "<|im_end|>", bos: str | None = None) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, bos_token=bos, pad_token="<pad>", chat_template=template
    )


def joined(batch: Any, row: int) -> list[int]:
    """Prompt and completion ids of a row, without padding."""
    return [
        *batch.prompt_NL[row, : batch.prompt_lengths_N[row]].tolist(),
        *batch.tokens_NT[row, : batch.lengths_N[row]].tolist(),
    ]


def said(batch: Any, row: int, tok: Any) -> str:
    """Return the text that the loss applies to."""
    return str(tok.decode(batch.tokens_NT[row][batch.mask_NT[row]]))


def test_a_chat_is_the_rendered_conversation_up_to_its_last_end_of_turn() -> None:
    tok = tokenizer()
    batch = Encoder(tok).batch([SKY], [7])
    for row, completion in enumerate(SKY.completions):
        text = f"<|im_start|>user\n{SKY.prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>"
        assert joined(batch, row) == tok(text)["input_ids"]
        assert said(batch, row, tok) == f"{completion}<|im_end|>"
    assert batch.prompts == [f"<|im_start|>user\n{SKY.prompt}<|im_end|>\n<|im_start|>assistant\n"] * 2
    assert batch.texts == list(SKY.completions)
    assert batch.group_N.tolist() == [0, 0]
    assert batch["uids_N"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("template", "eos", "bos", "prompt", "completion"),
    [
        (CHATML, "<|im_end|>", None, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>"),
        (LLAMA, "</s>", "<s>", "<s>[INST] Hi [/INST]", " Yo</s>"),
        (
            END_OF_TURN_APART_FROM_EOS,
            "</s>",
            "<s>",
            "<s><|im_start|>user\nHi<|eot|>\n<|im_start|>assistant\n",
            "Yo<|eot|>",
        ),
        (NO_END, "</s>", None, "user: Hi\nassistant: ", "Yo\n</s>"),
        (
            THINKING,
            "<|im_end|>",
            None,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
            "Yo<|im_end|>",
        ),
        (None, "</s>", "<s>", "<s>Hi", "Yo</s>"),
    ],
    ids=["chatml", "llama", "own end of turn", "no end of turn", "opens a thought", "no template"],
)
def test_templates_of_every_family_end_the_completion_where_the_policy_would(
    template: str | None, eos: str, bos: str | None, prompt: str, completion: str
) -> None:
    tok = tokenizer(template, eos, bos)
    batch = Encoder(tok).batch([Example("Hi", ("Yo",))], [0])
    assert tok.decode(batch.prompt_NL[0]) == prompt
    assert tok.decode(batch.tokens_NT[0]) == completion
    assert batch.mask_NT.all()


@given(st.text(), st.text())
def test_prompts_read_the_same_ids_as_training(prompt: str, completion: str) -> None:
    for encoder in (ENCODER, RAW):
        example = Example(prompt, (completion,))
        prompts, batch = encoder.prompts([Example(prompt)], [0]), encoder.batch([example], [0])
        assert prompts.token_ids[0] == batch.prompt_NL[0].tolist()
        assert prompts.texts == batch.prompts


ENCODER = Encoder(tokenizer())
RAW = Encoder(tokenizer(None, "</s>", "<s>"))


@given(st.lists(st.sampled_from(["a", " sea", "the sky", "ü", "🙂", "\n"]), max_size=6).map("".join))
def test_raw_text_is_appended_and_ended(completion: str) -> None:
    batch = RAW.batch([Example("Hello", (completion,))], [0])
    assert RAW.tokenizer.decode(joined(batch, 0)) == f"<s>Hello{completion}</s>"


def test_a_completion_that_brings_its_eos_gets_no_second_one() -> None:
    batch = RAW.batch([Example("Hello", ("there.</s>",))], [0])
    assert RAW.tokenizer.decode(batch.tokens_NT[0]) == "there.</s>"


def test_a_text_to_continue_pre_training_on_is_raw_and_has_something_before_it() -> None:
    for encoder, before in ((ENCODER, "<|im_end|>"), (RAW, "<s>")):
        batch = encoder.batch([Example("", ("Hello there.",))], [0])
        assert encoder.tokenizer.decode(batch.prompt_NL[0]) == before
        assert encoder.tokenizer.decode(batch.tokens_NT[0]) == f"Hello there.{encoder.tokenizer.eos_token}"


def test_every_assistant_turn_is_trained_and_what_lies_between_is_not() -> None:
    tok = tokenizer()
    turns = (
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "And?"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Thanks."},
    )
    batch = Encoder(tok).batch([Example("Count.", (turns,))], [0])
    text = (
        "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>"
    )
    assert tok.decode(joined(batch, 0)) == text
    assert said(batch, 0, tok) == "One.<|im_end|>Two.<|im_end|>"


def test_a_dialogue_without_template_is_written_as_human_and_assistant() -> None:
    chat = ({"role": "user", "content": "Hi?"},)
    turns = (
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "No."},
    )
    batch = RAW.batch([Example(chat, ("Yes.", turns))], [0])
    decoded = [RAW.tokenizer.decode(joined(batch, row)) for row in range(2)]
    assert decoded[0] == "<s>\n\nHuman: Hi?\n\nAssistant: Yes.</s>"
    assert decoded[1] == "<s>\n\nHuman: Hi?\n\nAssistant: Yes.</s>\n\nHuman: So?\n\nAssistant: No.</s>"
    assert said(batch, 1, RAW.tokenizer) == " Yes.</s> No.</s>"


def test_earlier_turns_that_a_template_rewrites_cannot_all_be_trained() -> None:
    last = "{% for m in messages %}{{ m.role }}{% if loop.last %} {{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    turns = (
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "2"},
    )
    with pytest.raises(DataError, match=r"rows:3: the chat template .*data.encoding.template_file"):
        Encoder(tokenizer(last)).batch([Example("Hi", (turns,), origin="rows:3")], [0])


def test_padding_is_on_the_right_and_outside_the_mask() -> None:
    batch = ENCODER.batch([Example("Hi", ("a", "a much longer one")), Example("Hello there, sky", ("b",))], [0, 1])
    assert batch.group_N.tolist() == [0, 0, 1]
    assert (batch.mask_NT == (torch.arange(batch.tokens_NT.shape[1]) < batch.lengths_N[:, None])).all()
    pad = ENCODER.tokenizer.pad_token_id
    assert (batch.tokens_NT[~batch.mask_NT] == pad).all()
    assert (batch.prompt_NL[:, -1] == torch.tensor([pad, pad, batch.prompt_NL[2, -1]])).all()


def test_numbers_labels_and_metadata_go_along_with_each_completion() -> None:
    rows = [
        Example("a", ("b", "c"), label="x", meta={"id": 1}, fields={"margin": 0.5}),
        Example("d", ("e",), fields={"margin": 2}),
    ]
    batch = ENCODER.batch(rows, [4, 9])
    assert batch["margin_N"].tolist() == [0.5, 0.5, 2.0]
    assert batch["margin_N"].dtype == torch.float32
    assert batch.labels == ["x", "x", None]
    assert batch.meta == [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "a"}, {"prompt": "d"}]
    assert ENCODER.prompts(rows[:1], [4]).examples[0].meta == {"id": 1, "prompt": "a"}
    with pytest.raises(DataError, match="rows:2: the number 'margin' is missing"):
        ENCODER.batch([rows[0], Example("d", ("e",), origin="rows:2")], [0, 1])


def test_rows_that_are_too_long_are_dropped_and_counted() -> None:
    encoder = Encoder(tokenizer(None, "</s>"), max_prompt_tokens=3)
    prompts = encoder.prompts([Example("abcdefgh"), Example("ab"), Example("zzzzzz")], [5, 6, 7])
    assert (prompts.texts, prompts.uids, encoder.dropped) == (["ab"], [6], 2)
    assert [encoder.fits_prompt(Example(text)) for text in ("ab", "zzzzzz")] == [True, False]
    with pytest.raises(
        UsageError,
        match=r"all 1 rows of a batch are longer than 3 prompt tokens or 2048 tokens in total: raise max_prompt_tokens",
    ):
        encoder.prompts([Example("zzzzzz")], [0])


def test_a_pair_is_dropped_whole() -> None:
    encoder = Encoder(tokenizer(None, "</s>"), encoding=Encoding(max_tokens=8))
    batch = encoder.batch([Example("a", ("z", "z" * 9)), Example("b", ("z", "zz"))], [0, 1])
    assert (batch.prompts, encoder.dropped) == (["b", "b"], 1)
    assert encoder.truncate(encoder.row(Example("a", ("z", "z" * 9)))) is None


def test_truncation_keeps_the_end_of_the_prompt_and_the_beginning_of_the_completion() -> None:
    encoder = Encoder(tokenizer(None, "</s>"), 4, Encoding(max_tokens=7, too_long="truncate"))
    batch = encoder.batch([Example("zzzzyxwv", ("zyxwv",)), Example("z", ("y",))], [0, 1])
    assert [encoder.tokenizer.decode(joined(batch, row)) for row in range(2)] == ["yxwvzyx", "zy</s>"]
    assert (encoder.truncated, encoder.dropped) == (1, 0)
    assert encoder.prompts([Example("zzzzyxwv")], [0]).texts == ["yxwv"]


def test_an_input_template_surrounds_plain_prompts() -> None:
    encoder = Encoder(tokenizer(), encoding=Encoding(input_template="Q: {} A:"))
    assert encoder.prompts([Example("{x}")], [0]).texts == ["Q: {x} A:"]


def test_a_preview_shows_the_first_rows_with_what_is_trained_on(capsys: Any) -> None:
    turns = (
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "2"},
    )
    encoder = Encoder(tokenizer(), preview=2)
    encoder.batch([Example("a", (turns,))], [0])
    encoder.batch([Example("b", ("x", "y")), Example("c", ("z",))], [1, 2])
    assert re.sub(r"\d+ (prompt|completion)", r"\1", capsys.readouterr().err) == (
        "--- prompt tokens\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\n--- completion tokens, 4 trained\n"
        "«1<|im_end|>»\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n«2<|im_end|>»\n"
        "--- prompt tokens\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n\n"
        "--- completion tokens, 2 trained\n«x<|im_end|>»\n--- completion tokens, 2 trained\n«y<|im_end|>»\n"
    )


def test_a_template_file_replaces_the_tokenizers(tmp_path: Any) -> None:
    (tmp_path / "t.jinja").write_text(NO_END)
    encoder = Encoder(tokenizer(), encoding=Encoding(template_file=str(tmp_path / "t.jinja")))
    assert encoder.prompts([Example("Hi")], [0]).texts == ["user: Hi\nassistant: "]


def test_tools_of_a_row_reach_the_template() -> None:
    template = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + CHATML
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    assert (
        Encoder(tokenizer(template))
        .prompts([Example("Hi", meta={"tools": [tool]})], [0])
        .texts[0]
        .startswith("clock <")
    )


@pytest.mark.parametrize(
    ("template", "encoding", "message"),
    [
        (None, Encoding(template="chat"), "no chat template"),
        (CHATML, Encoding(template="chat", input_template="{}"), "works only with raw prompts"),
        (CHATML, Encoding(input_template="Q:"), "needs {} where the prompt goes"),
        (CHATML, Encoding(template_file="nowhere.jinja"), "nowhere.jinja: No such file"),
    ],
)
def test_encodings_that_cannot_work_say_what_to_do(template: str | None, encoding: Encoding, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Encoder(tokenizer(template), encoding=encoding)


def test_rows_that_cannot_be_rendered_are_named() -> None:
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="rows:1: the chat cannot be rendered: roles must alternate"):
        Encoder(tokenizer(refuses)).prompts([Example("Hi", origin="rows:1")], [0])
    with pytest.raises(DataError, match="rows:1: the chat cannot be rendered: a chat with tool calls"):
        RAW.prompts([Example(({"role": "user", "tool_calls": [{"name": "clock"}]},), origin="rows:1")], [0])
    for encoder in (RAW, ENCODER):
        with pytest.raises(
            DataError, match="rows:1: a message has a part of type 'image', but the model reads only text"
        ):
            encoder.prompts([Example(({"role": "user", "content": [{"type": "image"}]},), origin="rows:1")], [0])
    with pytest.raises(DataError, match=r"rows:1: '\\ud800' is half of a surrogate pair"):
        RAW.prompts([Example("a \ud800", origin="rows:1")], [0])
    with pytest.raises(DataError, match="rows:1: no completion to train on"):
        RAW.batch([Example("Hi", origin="rows:1")], [0])
    with pytest.raises(DataError, match="rows:1: no assistant turn to train on"):
        ENCODER.batch([Example("Hi", (({"role": "user", "content": "?"},),), origin="rows:1")], [0])


def test_a_tokenizer_whose_completions_would_never_end_is_refused() -> None:
    for template in (None, NO_END):
        with pytest.raises(UsageError, match="no EOS token"):
            Encoder(tokenizer(template, eos=None))
    tok = tokenizer(eos=None)
    assert said(Encoder(tok).batch([Example("Hi", ("Yo",))], [0]), 0, tok) == "Yo<|im_end|>"
