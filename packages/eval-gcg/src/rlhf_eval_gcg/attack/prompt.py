"""Position of a suffix in a chat: the tokens before it, after it, and of the answers.

A chat is rendered once with a placeholder in the suffix's place. The tokens before, the suffix and the tokens after are
those of the whole text, so that what the attack optimizes is what a user's text becomes. `AttackPrompt.texts` and `stable`
are the way back: from tokens to the text in its place, and from that text to tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.data.boundary import TextTokenizer
from rlhf_core.errors import DataError, OptionError, UsageError, option
from rlhf_core.models.loading.tokenizer import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_eval_gcg.attack.goal import Goal
    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["AttackPrompt"]

PLACEHOLDER = "suffix-5e0b6c"
"""Placeholder of the suffix while a chat is rendered."""
ANCHOR = 8
"""Tokens before the suffix that are decoded with it; a blank or half a character needs no more."""


@dataclass(frozen=True)
class AttackPrompt:
    """One goal in its chat, ready for the model: before + suffix + after + answer."""

    goal: Goal
    """the goal"""
    before_ids: tuple[int, ...]
    """tokens before the suffix, BOS included"""
    suffix_ids: tuple[int, ...]
    """tokens of the initial suffix"""
    after_ids: tuple[int, ...]
    """tokens between the suffix and the answer; the first token of the answer is predicted from the last of them"""
    answers: tuple[tuple[int, ...], ...]
    """tokens of each answer: the target first"""
    content: tuple[str, str]
    """the user's message before and after the suffix"""
    rendering: tuple[str, str]
    """the whole text before and after the suffix"""
    blanks: str
    """blanks at the end of the text before, where the tokenizer makes them a part of the suffix's first token"""
    tokenizer: PreTrainedTokenizerBase
    """tokenizer of the model"""
    options: Attack
    """options of the attack"""

    @classmethod
    def build(cls, goal: Goal, tokenizer: PreTrainedTokenizerBase, options: Attack) -> AttackPrompt:
        """Place the initial suffix of `options` in the chat of `goal`.

        Raises:
            UsageError: the tokenizer has no chat template, or one that does not show the message as it is.
            DataError: the suffix merges with its neighbors, or an answer becomes no tokens.
        """
        content, suffix = _split_message(goal, options)
        rendering = _render(content, tokenizer, options)
        reader = TextTokenizer(tokenizer)
        before, after = rendering
        begin = reader.ids if options.chat else reader.with_bos
        whole = begin(before + suffix + after, goal.place)
        after_ids = reader.following(before + suffix, after, goal.place) if after else []
        cut = len(whole) - len(after_ids)
        for blanks in dict.fromkeys(("", before[len(before.rstrip(" ")) :])):
            text = before.removesuffix(blanks)
            before_ids = begin(text, goal.place) if text else []
            if whole[: len(before_ids)] == before_ids and whole[cut:] == after_ids and cut > len(before_ids):
                break
        else:
            raise DataError(
                f"{goal.place}: the tokenizer merges the suffix {suffix!r} with the text around it; "
                f"set {option('separator')} to a blank, or change {option('suffix')}"
            )
        if not before_ids + after_ids:
            raise DataError(f"{goal.place}: the suffix is the whole prompt; write a goal, or use a chat template")
        answers = tuple(
            tuple(_answer_ids(text, before + suffix + after, reader, goal, options)) for text in goal.answers
        )
        if not answers and options.objective != "reward":
            raise DataError(f"{goal.place}: the target is empty; write the answer that the attack aims for")
        return cls(
            goal, tuple(before_ids), tuple(whole[len(before_ids) : cut]), tuple(after_ids), answers, content, rendering,
            blanks, tokenizer, options,
        )  # fmt: skip

    def prompt_ids(self, suffix_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens of the prompt with a suffix, up to the answer."""
        return (*self.before_ids, *suffix_ids, *self.after_ids)

    def message(self, suffix: str) -> str:
        """Return the user's message with a suffix in its place."""
        return suffix.join(self.content)

    @property
    def question(self) -> str:
        """The user's message without a suffix; where a suffix goes by a marker, without the marker."""
        marked = self.options.suffix_place == "marker"
        return self.goal.goal.replace(self.options.marker, "") if marked else self.goal.goal

    def texts(self, suffixes: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each suffix in its place: what it adds to the text of the tokens before it."""
        anchor = list(self.before_ids[-ANCHOR:])
        start = (self._decode([anchor])[0] if anchor else "") + self.blanks
        together = self._decode([[*anchor, *ids] for ids in suffixes])
        return [text[len(start) :] if text.startswith(start) else "\ufffd" for text in together]

    def stable(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Return for each suffix whether its text, in its place in the chat, becomes exactly these tokens again."""
        if not suffixes:
            return []
        texts = self.texts(suffixes)
        whole = [self.render(text) for text in texts]
        encoded = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        if not self.options.chat:
            reader = TextTokenizer(self.tokenizer)
            encoded = [reader.with_bos(text) for text in whole]
        return [
            "\ufffd" not in text and tuple(ids) == self.prompt_ids(suffix)
            for text, ids, suffix in zip(texts, encoded, suffixes, strict=True)
        ]

    def render(self, suffix: str) -> str:
        """Return the whole prompt as text. A suffix with blanks at its ends is rendered anew: templates cut those off."""
        if suffix == suffix.strip() or not self.options.chat:
            return suffix.join(self.rendering)
        return _chat(self.message(suffix), self.tokenizer, self.options)

    def render_question(self) -> tuple[str, list[int]]:
        """Return the whole prompt without a suffix, as text and as tokens."""
        reader = TextTokenizer(self.tokenizer)
        if self.options.chat:
            text = _chat(self.question, self.tokenizer, self.options)
            return text, reader.ids(text)
        text = "".join(_render((self.question, ""), self.tokenizer, self.options))
        return text, reader.with_bos(text)

    def stands(self, suffix: str, prompt_ids: Sequence[int]) -> bool:
        """Return True if the user's message with a suffix, rendered anew by the template, becomes `prompt_ids`."""
        reader = TextTokenizer(self.tokenizer)
        if not self.options.chat:
            return tuple(reader.with_bos(suffix.join(self.rendering))) == tuple(prompt_ids)
        return tuple(reader.ids(_chat(self.message(suffix), self.tokenizer, self.options))) == tuple(prompt_ids)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        found: list[str] = self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return found


def _split_message(goal: Goal, options: Attack) -> tuple[tuple[str, str], str]:
    """Return the message before and after the suffix, and the initial suffix with what separates it."""
    if options.suffix_place == "marker":
        if goal.goal.count(options.marker) != 1:
            raise DataError(
                f"{goal.place}: expected {options.marker!r} once, at the place of the suffix, and found it "
                f"{goal.goal.count(options.marker)} times; write it once, or set {option('suffix_place')} to end"
            )
        before, after = goal.goal.split(options.marker)
        return (before, after), options.suffix
    if options.suffix_place == "before":
        return ("", options.separator + goal.goal if goal.goal else ""), options.suffix
    return (goal.goal, ""), (options.separator if goal.goal else "") + options.suffix


def _render(content: tuple[str, str], tokenizer: Any, options: Attack) -> tuple[str, str]:
    """Return the whole text before and after the suffix."""
    if not options.chat:
        before, after = content
        return (f"{options.system}\n\n" if options.system else "") + before, after + "\n"
    if not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer has no chat template; attack an instruction-tuned model, or set {option('chat', 'False')}"
        )
    parts = _chat(PLACEHOLDER.join(content), tokenizer, options).split(PLACEHOLDER)
    if len(parts) != 2:
        raise UsageError(
            f"the chat template repeats the user's message {len(parts) - 1} times; set {option('chat', 'False')}"
        )
    return parts[0], parts[1]


def _chat(message: str, tokenizer: Any, options: Attack) -> str:
    """Return the chat with `message` as text, up to the answer."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    try:
        return render_chat(tokenizer, [*system, {"role": "user", "content": message}])
    except UsageError:
        raise
    except Exception as error:  # a template is a program, and some refuse a system prompt
        raise OptionError("system" if system else "chat", f"cannot be rendered by the chat template: {error}") from None


def _answer_ids(text: str, prompt: str, reader: TextTokenizer, goal: Goal, options: Attack) -> list[int]:
    """Return the tokens of an answer after the prompt."""
    if options.add_space and not text.startswith(" "):
        text = " " + text
    ids = reader.following(prompt, text, goal.place)
    if not ids or not text.strip():
        raise DataError(f"{goal.place}: the target {text!r} has no tokens; write the answer that the attack aims for")
    return ids
