"""From rows to text: the chat template, or plain text, and the parts of a conversation that are the policy's.

A chat is rendered by its template alone; what a turn adds is the difference between two renderings. Templates are the
tokenizer's own, a file's, or none: then chats are written as HH dialogues and plain prompts stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.batch import Example, Message
from rlhf_core.data.boundary import common_length
from rlhf_core.data.chats import Chat, Text, find_unread_part, format_dialogue
from rlhf_core.errors import DataError, OptionError, UsageError, advice, run_option
from rlhf_core.util.limits import rendering_limits
from rlhf_core.util.text_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.models.inputs.processor import ImageReader

__all__ = ["Encoding", "Renderer"]

PROBE = "probe-7c1d0f"
"""An assistant's turn that stands for a sampled one: what the template writes after it is found by this text."""


LIMITS_ADVICE = f"raise {run_option('max_prompt_tokens')}" + advice(
    f" or {run_option('data.encoding.max_tokens')}, or pass {run_option('data.encoding.too_long', 'truncate')}"
)
"""Advice in errors about rows that are too long."""


@dataclass(frozen=True)
class Encoding:
    """Options that turn rows into tokens."""

    template: Literal["auto", "chat", "raw"] = "auto"
    """form of prompts: `chat` applies the tokenizer's chat template, with a plain prompt as one user message; `raw`
    writes plain text, with a chat as a Human/Assistant dialogue; `auto` takes chat if the tokenizer has a template"""
    template_file: str = ""
    """file with a Jinja chat template, in place of the tokenizer's"""
    input_template: str = ""
    """text around plain prompts, with {} for the prompt: 'Question: {} Answer:'; implies raw"""
    max_tokens: int = 2048
    """longest row in tokens, prompt and completion together, for rows that have completions"""
    too_long: Literal["drop", "truncate"] = "drop"
    """treatment of rows that are too long: dropped, or truncated at the prompt's beginning and the completion's end;
    both are counted"""


class Renderer:
    """Renders examples for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        encoding: which template.
        reader: what reads prompts with images, for a model that does; its template then is the model's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, reader: ImageReader | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._input_template = encoding.input_template
        own = reader.template if reader is not None else tokenizer.chat_template
        self.template = _template(own, encoding)
        """the chat template in force, None for raw text"""

    @property
    def identity(self) -> list[str]:
        """Return what decides a row's text in addition to the row: templates, and the date if a template uses it."""
        template = self.template or ""
        day = f"{date.today()}" if "strftime_now" in template else ""
        return [template, self._input_template, day, *(["in parts"] if self._reader is not None else [])]

    def uses_template(self, example: Example) -> bool:
        """Return True if a chat template renders the example, special tokens such as BOS included."""
        return self.template is not None and self._chat(example) is not None

    def prompt(self, example: Example) -> str:
        """The prompt, with what opens the assistant's turn; or with the turn's beginning, where the chat ends with that."""
        chat = self._chat(example)
        if chat is not None:
            return (
                self._prompt_to_continue(example, chat)
                if _is_begun(chat)
                else self._render(example, chat, generation=True)
            )
        assert isinstance(example.prompt, str)
        return self._input_template.replace("{}", example.prompt) if self._wraps(example) else example.prompt

    def pieces(self, example: Example, prompt_text: str, completion: Text) -> Iterator[tuple[str, bool]]:
        """The texts that follow the prompt, each with True if it is the policy's (an assistant's turn).

        `prompt_text` is the prompt as `prompt` renders it.

        Raises:
            DataError: the template does not show the turns one after another.
        """
        prompt = self._chat(example)
        if prompt is None:
            assert isinstance(completion, str)
            yield completion, True
            return
        turns: Chat = ({"role": "assistant", "content": completion},) if isinstance(completion, str) else completion
        if _is_begun(prompt) and turns[0]["role"] == "assistant":
            turns = ({**turns[0], "content": _join_contents(prompt[-1], turns[0], example.origin)}, *turns[1:])
            prompt = prompt[:-1]
        done = prompt_text
        for i, message in enumerate(turns):
            if message["role"] != "assistant":
                continue  # its text is part of what leads to the next assistant turn
            before = self._render(example, (*prompt, *turns[:i]), generation=True) if i else prompt_text
            if not before.startswith(done):
                raise DataError(
                    f"{example.origin}: the chat template rewrites earlier turns, so they cannot be trained on; "
                    f"{advice('pass ' + run_option('data.turns', 'last') + ', or ')}another "
                    f"{run_option('data.encoding.template_file')}"
                )
            if before != done:
                yield before[len(done) :], False
            chat = (*prompt, *turns[: i + 1])
            done = self._render(example, chat, generation=False)
            yield (done[len(before) :] if done.startswith(before) else self._rest_of_turn(example, chat, before)), True

    def continuation(self, example: Example, messages: Chat) -> tuple[str, str]:
        """Return the text that closes a last turn, and the text between a turn that `messages` answer and the next one.

        The sampled turn itself is never rendered: its tokens stay as they are. A template that changes earlier turns when
        others follow (one that removes reasoning, for example) can therefore be used.

        Raises:
            DataError: the template does not write `messages` after the turn that they answer.
        """
        prompt = self._chat(example) or ({"role": "user", "content": example.prompt},)
        prompt = prompt[:-1] if _is_begun(prompt) else prompt
        chat = (*prompt, {"role": "assistant", "content": PROBE})
        closed = self._render(example, chat, generation=False).rpartition(PROBE)
        answered = self._render(example, (*chat, *messages), generation=True).rpartition(PROBE)
        if not closed[1] or not answered[1]:
            raise DataError(
                f"{example.origin}: the chat template does not render messages that follow an assistant turn; pass "
                f"{run_option('data.encoding.template_file', 'FILE')}, or choose an environment whose feedback is "
                "plain text"
            )
        return closed[2], answered[2]

    def opening(self, example: Example) -> tuple[str, Callable[[], str]]:
        """Return what decides the text before the first message that is no system prompt, and a call that renders it."""
        chat = self._chat(example)
        assert chat is not None
        at = next((i for i, message in enumerate(chat) if message["role"] != "system"), len(chat) - 1)
        key = repr((chat[:at], chat[at]["role"], example.meta.get("tools")))
        probed = (*chat[:at], {"role": chat[at]["role"], "content": PROBE})
        return key, lambda: self._render(example, probed, generation=False).partition(PROBE)[0]

    def _prompt_to_continue(self, example: Example, chat: Chat) -> str:
        """The text of a chat whose last turn, the assistant's, continues: without what closes the turn."""
        text, (_, closing) = self._render(example, chat, generation=False), self._around(example, chat)
        if not text.endswith(closing):
            raise _not_shown(example)
        return text.removesuffix(closing)

    def _rest_of_turn(self, example: Example, chat: Chat, before: str) -> str:
        """Return what the last turn of `chat` adds to `before`, whose opening may hold more than past turns show: <think>.

        A turn that begins with that too continues it.
        """
        content = chat[-1].get("content")
        if not isinstance(content, str):
            raise _not_shown(example)
        head, closing = self._around(example, chat)
        opener, said = before[common_length(head, before) :], content.strip()
        if opener.strip() and said.startswith(opener.strip()):
            said = said.removeprefix(opener.strip())
            said = said.removeprefix(opener[len(opener.rstrip()) :])
        return said + closing

    def _around(self, example: Example, chat: Chat) -> tuple[str, str]:
        """Return the texts that a template writes before and after the text of the last turn of `chat`."""
        probed = (*chat[:-1], {**chat[-1], "content": PROBE})
        head, shown, closing = self._render(example, probed, generation=False).rpartition(PROBE)
        if not shown:
            raise _not_shown(example)
        return head, closing

    def _wraps(self, example: Example) -> bool:
        return bool(self._input_template and example.prompt)  # an empty prompt is pre-training text

    def _chat(self, example: Example) -> Chat | None:
        """The prompt as messages, or None where it stays plain text."""
        if not isinstance(example.prompt, str):
            return example.prompt
        plain = all(isinstance(completion, str) for completion in example.completions)
        if plain and (self.template is None or not example.prompt):
            return None
        return ({"role": "user", "content": example.prompt},)

    def _render(self, example: Example, chat: Chat, generation: bool) -> str:
        """The text of `chat`, with what opens the assistant's turn if `generation`."""
        reads = ("text",) if self._reader is None else ("text", "image")
        if part := find_unread_part(chat, reads):
            raise DataError(
                f"{example.origin}: a message has a part of type {part!r}, but the model reads only "
                f"{' and '.join(reads)}"
            )
        try:
            if self.template is None:
                return format_dialogue(chat) + ("\n\nAssistant:" if generation else "")
            with rendering_limits():
                text = self._tokenizer.apply_chat_template(
                    [dict(message) if self._reader is None else _split_contents(message) for message in chat],
                    tools=example.meta.get("tools"),
                    chat_template=self.template,
                    add_generation_prompt=generation,
                    tokenize=False,
                )
            return str(text)
        except Exception as error:  # a template is a program: it may divide by zero, or call itself without end
            said = str(error) or type(error).__name__
            raise DataError(f"{example.origin}: the chat cannot be rendered: {said}") from None


def _split_contents(message: Message) -> dict[str, Any]:
    """The message as templates of vision-language models want it: contents are lists, and of an image there is its place."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    shown = [{"type": "image"} if part["type"] == "image" else part for part in parts or []]
    return {**message, **({"content": shown} if content is not None else {})}


def _is_begun(chat: Chat) -> bool:
    """True if a prompt ends with the beginning of its answer."""
    return bool(chat[-1]["role"] == "assistant")


def _join_contents(begun: Message, turn: Message, origin: str) -> str:
    """Join the content of a turn whose beginning is part of the prompt."""
    parts = [begun.get("content"), turn.get("content")]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"{origin}: the prompt ends with an assistant message, so it and the answer must both be text")
    return "".join(map(str, parts))


def _not_shown(example: Example) -> DataError:
    return DataError(
        f"{example.origin}: the chat template does not show the assistant's turn; pass "
        f"{run_option('data.encoding.template_file')}"
    )


def _template(own: str | dict[str, str] | None, encoding: Encoding) -> str | None:
    """The chat template in force, None for raw text."""
    if encoding.template == "chat" and encoding.input_template:
        raise OptionError(
            "/data.encoding.input_template",
            f"works only with raw prompts; leave out {run_option('data.encoding.template', 'chat')}",
        )
    if encoding.input_template and "{}" not in encoding.input_template:
        raise OptionError("/data.encoding.input_template", "needs {} where the prompt goes")
    if encoding.template == "raw" or encoding.input_template:
        return None
    if encoding.template_file:
        try:
            return read_text(Path(encoding.template_file))
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise OptionError("/data.encoding.template_file", f"{encoding.template_file}: {said}") from None
    own = own.get("default") if isinstance(own, dict) else own
    if not own and encoding.template == "chat":
        raise UsageError(
            f"there is no chat template: pass {run_option('data.encoding.template_file', 'FILE')}, or "
            f"{run_option('data.encoding.template', 'raw')}"
        )
    return own or None
