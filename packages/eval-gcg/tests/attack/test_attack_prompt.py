"""A suffix has its place in a chat, and its tokens are those that a user's text becomes there."""

from __future__ import annotations

import copy
import random

import pytest
from tiny_attacks import CHATS, family

from rlhf_core.errors import DataError, UsageError
from rlhf_eval_gcg.attack import Attack, AttackPrompt, Goal

PLACES = {
    "end": ("Say hello", "Say hello{} x x x !"),
    "before": ("Say hello", "x x x !{} Say hello"),
    "marker": ("Say <here> hello", "Say x x x ! hello"),
}


def build(name: str, place: str = "end", system: str = "", **changes: object) -> AttackPrompt:
    options = Attack(suffix="x x x !", suffix_place=place, system=system, marker="<here>", **changes)  # type: ignore[arg-type]
    return AttackPrompt.build(Goal(PLACES[place][0], "Sure, hello"), family(name), options)


@pytest.mark.parametrize("system", ["", "You are kind."])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CHATS)
def test_the_tokens_of_all_parts_are_those_of_the_text_a_user_sends(name: str, place: str, system: str) -> None:
    prompt, tokenizer = build(name, place, system), family(name)
    message = prompt.message(prompt.texts([prompt.suffix_ids])[0])
    assert message == PLACES[place][1].format("")
    chat = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    whole = tokenizer(text + "Sure, hello", add_special_tokens=False)["input_ids"]
    together = [*prompt.prompt_ids(prompt.suffix_ids), *prompt.answers[0]]
    assert together[: len(prompt.prompt_ids(prompt.suffix_ids))] == whole[: len(together) - len(prompt.answers[0])]
    if name not in ("llama-2", "mistral"):  # after "[/INST]" a text of its own has no blank, and no letters merge
        assert together == whole
    assert tokenizer.decode(prompt.answers[0]).strip() == "Sure, hello"


@pytest.mark.parametrize("name", CHATS)
def test_exactly_the_candidates_that_become_the_same_tokens_again_are_stable(name: str) -> None:
    prompt, tokenizer = build(name), family(name)
    draw = random.Random(0)
    rows = [list(prompt.suffix_ids) for _ in range(300)]
    for row in rows:
        row[draw.randrange(len(row))] = draw.randrange(len(tokenizer))
    found = prompt.stable(rows)
    assert 20 < sum(found) < 300
    for row, text, stable in zip(rows, prompt.texts(rows), found, strict=True):
        chat = [{"role": "user", "content": prompt.message(text)}]
        whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert stable == (tokenizer(whole, add_special_tokens=False)["input_ids"] == list(prompt.prompt_ids(row)))


def test_a_suffix_that_the_template_strips_is_unstable() -> None:
    prompt, tokenizer = build("llama-3"), family("llama-3")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert prompt.stable([prompt.suffix_ids, (*prompt.suffix_ids[:-1], *newline)]) == [True, False]


def test_plain_text_is_system_prompt_goal_suffix_line_break_target() -> None:
    prompt = build("gpt-2", system="You are kind.", chat=False)
    whole = family("gpt-2")("You are kind.\n\nSay hello x x x !\nSure, hello")["input_ids"]
    assert [*prompt.prompt_ids(prompt.suffix_ids), *prompt.answers[0]] == whole
    assert prompt.stable([prompt.suffix_ids]) == [True]


def test_plain_text_begins_with_the_tokenizers_bos() -> None:
    prompt = build("llama-2", chat=False)
    whole = family("llama-2")("Say hello x x x !\n")["input_ids"]
    assert list(prompt.prompt_ids(prompt.suffix_ids)) == whole
    assert whole[0] == family("llama-2").bos_token_id
    assert prompt.stable([prompt.suffix_ids]) == [True]


def test_a_blank_before_the_target_is_an_option() -> None:
    prompt = build("qwen", add_space=True)
    assert family("qwen").decode(prompt.answers[0]) == " Sure, hello"


def test_an_empty_goal_leaves_the_suffix_as_the_whole_message() -> None:
    options = Attack(suffix="x x x !")
    prompt = AttackPrompt.build(Goal("", "Sure"), family("mistral"), options)
    assert prompt.message(prompt.texts([prompt.suffix_ids])[0]) == "x x x !"
    assert prompt.stable([prompt.suffix_ids]) == [True]


@pytest.mark.parametrize(
    ("goal", "name", "changes", "said"),
    [
        (Goal("Say", ""), "qwen", {}, "the target is empty"),
        (Goal("Say", "  "), "qwen", {}, "has no tokens"),
        (Goal("Say", "Sure"), "gpt-2", {}, "the tokenizer has no chat template"),
        (Goal("Say {suffix} {suffix}", "Sure"), "qwen", {"suffix_place": "marker"}, "found it 2 times"),
        (Goal("Say hel", "Sure"), "qwen", {"separator": "", "suffix": "lo"}, "merges the suffix"),
        (
            Goal("", "Sure", origin="a.csv:3"),
            "gpt-2",
            {"chat": False, "suffix": "\ud800"},
            "a.csv:3: .* half of a surrogate pair",
        ),
    ],
)
def test_a_mistake_is_one_line(goal: Goal, name: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        AttackPrompt.build(goal, family(name), Attack(**changes))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_template_that_hides_the_message_or_the_system_prompt_says_so() -> None:
    tokenizer = copy.deepcopy(family("qwen"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(UsageError, match="repeats the user's message 0 times"):
        AttackPrompt.build(Goal("Say", "Sure"), tokenizer, Attack())
    tokenizer.chat_template = "{{ raise_exception('no system prompts') }}"
    with pytest.raises(UsageError, match="system cannot be rendered by the chat template: no system prompts"):
        AttackPrompt.build(Goal("Say", "Sure"), tokenizer, Attack(system="Be kind."))


def test_errors_of_goals_are_errors_of_data() -> None:
    with pytest.raises(DataError, match="goals.csv:2"):
        AttackPrompt.build(Goal("Say", "", origin="goals.csv:2"), family("qwen"), Attack())


@pytest.mark.parametrize("place", PLACES)
def test_plain_text_has_a_line_break_before_the_answer_wherever_the_suffix_is(place: str) -> None:
    prompt, tokenizer = build("gpt-2", place, system="You are kind.", chat=False), family("gpt-2")
    text = "You are kind.\n\n" + PLACES[place][1].format("") + "\n"
    assert tokenizer.decode(prompt.prompt_ids(prompt.suffix_ids)) == text
    assert prompt.stands(prompt.texts([prompt.suffix_ids])[0], prompt.prompt_ids(prompt.suffix_ids))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_the_question_without_a_suffix_is_that_of_the_user(place: str, chat: bool) -> None:
    prompt, tokenizer = build("qwen", place, chat=chat), family("qwen")
    question = PLACES[place][0].replace("<here>", "")
    message = [{"role": "user", "content": question}]
    expected = (
        tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False) if chat else question + "\n"
    )
    text, ids = prompt.render_question()
    assert text == expected and ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert prompt.question == question
