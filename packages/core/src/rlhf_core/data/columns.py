"""From a row of a file to an `Example`: which column is the prompt, which the completion, which the label.

Every reader of tables shares these options. A key may be a path into nested values, `messages/-1/content`. Keys that
are not given are looked for in the first row, in the order of the tables below, and hold for all rows: a file is read
the same way from its first to its last row, or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache
from typing import Any, TypeVar

from rlhf_core.contract.batch import Example
from rlhf_core.data.cells import kind_of, plain_number, tools
from rlhf_core.data.chats import (
    Chat,
    Text,
    Turns,
    common_prompt,
    is_dialogue,
    parse_dialogue,
    plain_text,
    split_chat,
    to_chat,
    to_history,
)
from rlhf_core.data.images import attach_images, has_images, make_paths_absolute
from rlhf_core.errors import DataError, option
from rlhf_core.util.messages import log

__all__ = ["COMPLETION", "OPTIONAL", "PROMPT", "Columns", "lookup"]

Read = TypeVar("Read")

CHATS = ("messages", "conversations")
"""Names of the column of a whole chat; it comes before a prompt if the row has no completion."""
PROMPT = ("prompt", *CHATS, "question", "instruction", "input")
"""Names of the prompt's column, in order of preference. A filled `input` next to `instruction` is added (Alpaca)."""
COMPLETION = ("response", "answer", "completion", "output")
"""Names of the column of a completion."""
TEXT = "text"
"""Without any of the above: a text to continue pre-training on, with no prompt."""
IMAGES = ("images", "image")
"""Names of the column of images."""
OPTIONAL = ("system", "context", "history")
"""Columns put before a prompt; not every row has them."""
NAMED = 12
"""Columns that a message names at most."""
KEPT = ("datasource", "tools")
"""Columns that always go into `meta`: one splits metrics, the other is for the chat template."""


@dataclass(frozen=True)
class Columns:
    """Names of a row's columns by meaning."""

    path: str
    """location of the rows"""
    _: KW_ONLY
    prompt_key: str = ""
    """column of the prompt, text or chat; the default finds prompt, messages, conversations, question, instruction (+
    input)"""
    completion_key: str = ""
    """column of the answer; the default finds response, answer, completion, output"""
    chosen_key: str = ""
    """column of the preferred answer or whole dialogue; the default finds chosen, next to rejected"""
    rejected_key: str = ""
    """column of the other answer or whole dialogue"""
    system_key: str = ""
    """column of the system prompt, for rows that have none; the default finds system. `none` ignores it"""
    context_key: str = ""
    """column of a text put before a plain prompt; the default finds context. `none` ignores it"""
    history_key: str = ""
    """column of earlier turns: a chat, or pairs of question and answer; the default finds history. `none` ignores it"""
    label_key: str = ""
    """column passed to rewards, for example a reference answer; the default finds label"""
    text_key: str = ""
    """column of texts for continued pre-training, without prompts; the default finds text if there is no prompt"""
    images_key: str = ""
    """column of the prompt's images: a path relative to the data, base64, or a list; the default finds images, image;
    `none` ignores them"""
    max_images: int = 0
    """maximum number of images in a prompt; more are an error. 0 means no limit"""
    number_keys: tuple[str, ...] = ()
    """columns of numbers that losses read as <column>_N, for example margin"""
    meta_keys: tuple[str, ...] = ()
    """further columns passed to rewards and samples.jsonl; datasource and tools always are"""
    system: str = ""
    """system prompt put before every prompt that has none"""
    turns: Turns = "last"
    """turns of a chat that are trained on: its last assistant turn, or all of them"""
    unique: bool = False
    """drop rows whose prompt and completions occurred before, counted in data/duplicates"""

    def infer_columns(self, row: Mapping[str, Any], origin: str) -> Columns:
        """Return these columns with missing keys filled in from the names in `row`; log the columns that are not read."""
        return self.find_columns(row, origin)._reporting(row, origin)

    def find_columns(self, row: Mapping[str, Any], origin: str) -> Columns:
        """These columns with every key that was left open filled in from the names in `row`."""
        given = {
            self.prompt_key,
            self.completion_key,
            self.chosen_key,
            self.rejected_key,
            self.label_key,
            self.text_key,
            self.system_key,
            self.context_key,
            self.history_key,
            *self.meta_keys,
            *self.number_keys,
        }
        free = {name for name in row if name not in given}

        def first(key: str, *names: str) -> str:
            return key or next((name for name in names if name in free), "")

        if self.text_key:
            return self
        chosen, rejected = first(self.chosen_key, "chosen"), first(self.rejected_key, "rejected")
        if bool(chosen) != bool(rejected):
            if self.chosen_key or self.rejected_key:
                raise DataError(f"{origin}: a preference needs {option('chosen_key')} and {option('rejected_key')}")
            chosen = rejected = ""
        completion = self.completion_key if chosen else first(self.completion_key, *COMPLETION)
        prompt = first(self.prompt_key, *(PROMPT if completion or chosen else (*CHATS, *PROMPT)))
        found = replace(
            self,
            prompt_key=prompt,
            chosen_key=chosen,
            rejected_key=rejected,
            completion_key=completion,
            label_key=first(self.label_key, "label"),
            images_key=first(self.images_key, *IMAGES),
            system_key=self.system_key or _column_of(row, "system", free, str),
            context_key=self.context_key or (_column_of(row, "context", free, str) if _is_plain(row, prompt) else ""),
            history_key=self.history_key or _column_of(row, "history", free, (list, tuple)),
        )
        if prompt or chosen:
            return found
        if TEXT in free:
            return replace(found, text_key=TEXT)
        raise DataError(
            f"{origin}: no prompt among the columns {', '.join(map(str, row))}; pass {option('prompt_key')}"
        )

    def _reporting(self, row: Mapping[str, Any], origin: str) -> Columns:
        """These columns; those of `row` that are not among them are logged, once for a file."""
        keys = [value for key, value in vars(self).items() if key.endswith("_key")]
        read = {key if key in row else key.split("/")[0] for key in (*keys, *self.meta_keys, *self.number_keys)}
        read |= {*KEPT, *(("input",) if self.prompt_key == "instruction" else ())}
        report_unread(origin.rpartition(":")[0], tuple(str(name) for name in row if name not in read))
        return self

    def example(self, row: Any, origin: str) -> Example:
        """The example in `row`; call it on what `infer_columns` returned.

        Raises:
            DataError: `origin: ` what was expected.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"{origin}: a row should be an object with named columns, not {type(row).__name__}")
        try:
            prompt, completions = self._texts(row)
            prompt = self._with_earlier(prompt, row) if not self.text_key else prompt
            prompt = self._with_images(prompt, completions, row, origin)
            return Example(
                prompt=prompt,
                completions=completions,
                label=lookup(row, self.label_key) if self.label_key else None,
                meta=self._meta(row),
                fields={key: _number(row, key) for key in self.number_keys},
                origin=origin,
            )
        except ValueError as error:
            raise DataError(f"{origin}: {error}") from None

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that rewards and templates receive with the row."""
        kept = {key: row[key] for key in KEPT if row.get(key)}
        if "tools" in kept:
            kept["tools"] = tools(kept["tools"])
        return {key: lookup(row, key) for key in self.meta_keys} | kept

    def _texts(self, row: Mapping[str, Any]) -> tuple[Text, tuple[Text, ...]]:
        """Prompt and completions."""
        if self.text_key:
            return "", (_words(row, self.text_key),)
        if self.chosen_key:
            return self._pair(row)
        prompt = _prompt(row, self.prompt_key)
        if self.prompt_key == "instruction" and isinstance(prompt, str) and row.get("input"):
            prompt = f"{prompt}\n\n{_words(row, 'input')}"
        if self.completion_key:
            return prompt, (_answer(row, self.completion_key, prompt),)
        begun = self.prompt_key == PROMPT[0] and not isinstance(lookup(row, self.prompt_key), str)
        if isinstance(prompt, str) or begun:  # an assistant's turn at the end of a prompt begins the answer
            return prompt, ()
        return _with_column_name(self.prompt_key, split_chat, prompt, self.turns)

    def _pair(self, row: Mapping[str, Any]) -> tuple[Text, tuple[Text, Text]]:
        """A preference: answers to a prompt, or two dialogues that share their beginning."""
        chosen, rejected = _text(row, self.chosen_key), _text(row, self.rejected_key)
        whole = [not isinstance(side, str) and side[0]["role"] != "assistant" for side in (chosen, rejected)]
        if not isinstance(chosen, str) and not isinstance(rejected, str) and all(whole):
            return _with_column_name(f"{self.chosen_key}' and '{self.rejected_key}", common_prompt, chosen, rejected)
        if any(whole):
            raise ValueError(
                f"{self.chosen_key!r} and {self.rejected_key!r} should both be dialogues or both be answers"
            )
        if not self.prompt_key:
            raise ValueError(
                f"{self.chosen_key!r} is an answer, so a prompt is expected too ({option('prompt_key')}); "
                f"the columns are {', '.join(map(str, row))}"
            )
        prompt = _prompt(row, self.prompt_key)
        return prompt, (_answer(row, self.chosen_key, prompt), _answer(row, self.rejected_key, prompt))

    def _with_images(self, prompt: Text, completions: tuple[Text, ...], row: Mapping[str, Any], origin: str) -> Text:
        """The prompt with the images of the row's column, and every file of its images found."""
        if self.images_key not in ("", "none") and (column := lookup(row, self.images_key)):
            if self.text_key:
                raise ValueError(
                    f"{self.images_key!r}: images need a prompt that contains them ({option('prompt_key')})"
                )
            try:
                prompt = attach_images(prompt, column)
            except ValueError as error:
                hint = f"; {option('images_key', 'none')} ignores the column"
                raise ValueError(f"{self.images_key!r}: {error}{hint}") from None
        if any(map(has_images, completions)):
            raise ValueError(
                "an image comes after the first trained answer; images must be in the prompt "
                f"({option('turns', 'last')})"
            )
        return (
            make_paths_absolute(prompt, origin, self.max_images)
            if not isinstance(prompt, str) and has_images(prompt)
            else prompt
        )

    def _with_earlier(self, prompt: Text, row: Mapping[str, Any]) -> Text:
        """The prompt after what other columns put before it: context, earlier turns, and a system prompt where it has none."""
        if isinstance(prompt, str) and _cell(row, self.context_key):
            prompt = f"{_words(row, self.context_key)}\n\n{prompt}"
        history = _cell(row, self.history_key)
        earlier = _with_column_name(self.history_key, to_history, history) if history else ()
        system = _words(row, self.system_key) if _cell(row, self.system_key) else self.system
        if not earlier and not system:
            return prompt
        chat: Chat = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        own, rest = (chat[:1], chat[1:]) if chat[0]["role"] == "system" else ((), chat)
        if system and not any(message["role"] == "system" for message in (*own, *earlier)[:1]):
            own = ({"role": "system", "content": system},)
        return (*own, *earlier, *rest)


def lookup(row: Mapping[str, Any], key: str) -> Any:
    """The value at `key`, which may be a path: names and list positions separated by slashes.

    Raises:
        ValueError: there is none; the message states how far the path led.
    """
    if key in row:
        return row[key]
    value: Any = row
    parts = key.split("/")
    for depth, part in enumerate(parts):
        try:
            value = value[part] if isinstance(value, Mapping) else value[int(part)]
        except (KeyError, IndexError, TypeError, ValueError):
            inside = f" in {'/'.join(parts[:depth])!r}" if depth else ""
            names = f"; found only {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
            raise ValueError(f"expected a column {part!r}{inside}{names}") from None
    return value


def _text(row: Mapping[str, Any], key: str) -> Text:
    """Text, or a chat. An HH dialogue is a chat."""
    value = lookup(row, key)
    if isinstance(value, str):
        return parse_dialogue(value) if is_dialogue(value) else value
    if isinstance(value, (list, tuple)):
        return _with_column_name(key, to_chat, value)
    if (number := plain_number(value)) is not None:
        return number
    raise ValueError(f"{key!r} should be text or a chat, not {kind_of(value)}")


def _with_column_name(key: str, read: Callable[..., Read], *arguments: Any) -> Read:
    """Call `read`; its error messages begin with the column."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f"'{key}': {error}") from None


def _prompt(row: Mapping[str, Any], key: str) -> Text:
    """Text or a chat to be answered; an HH dialogue may end with an empty "Assistant:" that asks for it."""
    prompt = _text(row, key)
    asked = prompt[:-1] if prompt[-1:] == ({"role": "assistant", "content": ""},) else prompt
    if prompt and not asked:
        raise ValueError(f"{key!r} is one empty assistant message: there is no prompt to answer")
    return asked


def _answer(row: Mapping[str, Any], key: str, prompt: Text) -> Text:
    """A completion: messages, or plain text. In a chat the template sets the blanks around it, but for an answer
    that the prompt begins."""
    value = lookup(row, key)
    if isinstance(value, str):
        return value if isinstance(prompt, str) or prompt[-1]["role"] == "assistant" else value.strip()
    said = _text(row, key)
    return said if isinstance(said, str) else plain_text(said)


def _words(row: Mapping[str, Any], key: str) -> str:
    value = lookup(row, key)
    text = value if isinstance(value, str) else plain_number(value)
    if text is None:
        raise ValueError(f"{key!r} should be text, not {kind_of(value)}")
    return text


def _cell(row: Mapping[str, Any], key: str) -> Any:
    """The value at the key of an optional column, None where the row has no such cell."""
    return lookup(row, key) if key in row or "/" in key else None


def _column_of(row: Mapping[str, Any], name: str, free: set[str], kinds: type | tuple[type, ...]) -> str:
    """The name, if the row has such a column and it holds such values."""
    return name if name in free and (row[name] is None or isinstance(row[name], kinds)) else ""


def _is_plain(row: Mapping[str, Any], key: str) -> bool:
    """True if the prompt is plain text in the first row."""
    value = row.get(key)
    return isinstance(value, str) and not is_dialogue(value)


def _number(row: Mapping[str, Any], key: str) -> float:
    value = lookup(row, key)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key!r} should be a finite number, not {value!r}")
    return float(value)


@cache
def report_unread(path: str, names: tuple[str, ...]) -> None:
    """Log, once and on the first rank, the columns of a file that nothing reads."""
    if names and not int(os.environ.get("RANK", "0")):
        shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        log.info(f"{path}: unused columns: {shown} (rewards receive those that the option data.meta_keys names)")
