"""Chats: their shapes on disk, and how they are cut into prompt and completion.

Three shapes are read: a list of `{"role", "content"}` messages, the ShareGPT list of `{"from", "value"}`, and the HH
text "\\n\\nHuman: … \\n\\nAssistant: …". All become a tuple of messages; `as_dialogue` writes the HH text again for
tokenizers that have no chat template. An error in a row raises `ValueError` without its place: the
reader knows file and row and adds them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from rlhf_core.contract.batch import Message
from rlhf_core.data.cells import plain_number, tool_calls
from rlhf_core.data.images import image_part

__all__ = [
    "DIALOGUE",
    "Chat",
    "Text",
    "Turns",
    "common_prompt",
    "find_unread_part",
    "format_dialogue",
    "is_dialogue",
    "parse_dialogue",
    "plain_text",
    "split_chat",
    "to_chat",
    "to_history",
]

Chat = tuple[Message, ...]
Text = str | Chat
"""A prompt or a completion: plain text or messages."""
Turns = Literal["last", "all"]

SPEAKER = {"user": "Human", "assistant": "Assistant"}
_SHAREGPT = {"human": "user", "gpt": "assistant"}
DIALOGUE = f"{SPEAKER['user']}:"
"""Beginning of a dialogue."""
_TURN = re.compile(r"\n\n(Human|Assistant):")


def to_chat(value: Sequence[Any]) -> Chat:
    """Messages as they are, ShareGPT's renamed.

    Raises:
        ValueError: something in the list is not a message.
    """
    if not value:
        raise ValueError("a chat must have at least one message")
    return tuple(_message(item, number) for number, item in enumerate(value))


def to_history(value: Sequence[Any]) -> Chat:
    """Earlier turns: messages, or pairs of question and answer.

    Raises:
        ValueError: something in the list is neither.
    """
    turns: list[Message] = []
    for item in value:
        if isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(said, str) for said in item):
            turns += [{"role": role, "content": said} for role, said in zip(SPEAKER, item)]
        else:
            turns.append(_message(item, len(turns)))
    return tuple(turns)


def _message(item: Any, number: int) -> Message:
    if isinstance(item, Mapping) and "from" in item and "value" in item:
        speaker = item["from"]
        item = {"role": _SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else None, "content": item["value"]}
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise ValueError(f'message {number} should be {{"role": …, "content": …}}, not {_excerpt(item)}')
    filled = {key: value for key, value in item.items() if value is not None}  # tables fill absent keys with null
    try:
        filled = tool_calls(filled)
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None
    if (text := plain_number(filled.get("content"))) is not None:
        filled["content"] = text
    if not ("content" in filled or "tool_calls" in filled):
        raise ValueError(f"message {number} ({item['role']}) has no content")
    if isinstance(filled.get("content"), (list, tuple)):
        filled["content"] = _parts(filled["content"], number)
    return filled


def _parts(content: Sequence[Any], number: int) -> str | list[Any]:
    """A content given in parts: text alone becomes one text, which every template knows."""
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError(f'message {number}: a part should be {{"type": "text", "text": …}}, not {_excerpt(part)}')
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    if all(part["type"] == "text" and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    try:
        return [image_part(part) if part["type"] in ("image", "image_url") else part for part in parts]
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None


def find_unread_part(chat: Chat, seen: Collection[str] = ("text",)) -> str:
    """The first part of a type that a model does not read, for example an image; empty if there is none."""
    parts = (part for message in chat if isinstance(message.get("content"), list) for part in message["content"])
    return next((str(part["type"]) for part in parts if part["type"] not in seen), "")


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def is_dialogue(text: str) -> bool:
    """Return True if `text` is an HH dialogue: it begins with a human turn."""
    return text.lstrip().startswith(DIALOGUE)


def parse_dialogue(text: str) -> Chat:
    """The turns of an HH dialogue without blanks around them; two texts of one speaker in a row are one turn."""
    parts = _TURN.split("\n\n" + text.lstrip())[1:]
    roles = {speaker: role for role, speaker in SPEAKER.items()}
    chat: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        if chat and chat[-1]["role"] == roles[speaker]:
            chat[-1]["content"] = f"{chat[-1]['content']}\n\n{said.strip()}".strip()
        else:
            chat.append({"role": roles[speaker], "content": said.strip()})
    return tuple(chat)


def format_dialogue(chat: Chat) -> str:
    """The HH text of a chat; other roles than user and assistant are written without a speaker."""
    turns = []
    for message in chat:
        if not isinstance(message.get("content"), str):
            raise ValueError("a chat with tool calls or images needs a tokenizer with a chat template")
        speaker = SPEAKER.get(message["role"])
        turns.append(f"\n\n{speaker}: {message['content']}" if speaker else message["content"])
    return "".join(turns)


def split_chat(chat: Chat, turns: Turns = "last") -> tuple[Chat, tuple[Text, ...]]:
    """Prompt and completion of a chat that ends with an answer; without one it is a prompt.

    Args:
        chat: the messages.
        turns: train on the last assistant turn, or on every one (then the prompt ends before the first).
    """
    if chat[-1]["role"] != "assistant":
        return chat, ()
    at = len(chat) - 1
    if turns == "all":
        at = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
    if at == 0:
        raise ValueError("the chat begins with the assistant: there is no prompt to answer")
    return chat[:at], (plain_text(chat[at:]),)


def common_prompt(chosen: Chat, rejected: Chat) -> tuple[Chat, tuple[Text, Text]]:
    """Return the shared beginning of two dialogues, and the rest of each, both beginning with an assistant turn."""
    longest = min(len(chosen), len(rejected)) - 1  # both must have a rest
    shared = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    while shared > 0 and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if shared == 0:
        raise ValueError("both should begin with the same prompt and each end with an assistant turn")
    return chosen[:shared], (plain_text(chosen[shared:]), plain_text(rejected[shared:]))


def plain_text(chat: Chat) -> Text:
    """The text alone if `chat` is one plain assistant message."""
    match chat:
        case ({"role": "assistant", "content": str(content), **rest},) if not rest:
            return content
    return chat
