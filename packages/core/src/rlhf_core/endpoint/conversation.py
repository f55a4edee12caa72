"""From messages that an agent sends to the ids that the policy reads, and back.

An agent sends its whole conversation with every request. The turns in it that the policy wrote are found again, and
appear in the rendered chat as they were sampled. If the chat then begins with everything that a context holds, the ids
of that context are continued: sampled ids are never encoded again. Otherwise the template or the agent has rewritten
what stood before, and the request begins a new context with the ids of the rendered chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.contract.batch import Example
from rlhf_core.contract.driving import Policy, Reply
from rlhf_core.contract.episode import Feedback
from rlhf_core.endpoint.fields import Fields, check_fields
from rlhf_core.endpoint.http import HttpError
from rlhf_core.endpoint.sampling import TurnOptions, check_distribution
from rlhf_core.endpoint.tool_calls import ToolCall, find_tool_calls

__all__ = ["Answer", "Conversation", "message_of"]

Chat = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Answer:
    """One turn as the agent gets it."""

    reply: Reply
    prompt_ids: tuple[int, ...]
    content: str
    """the text without tool calls and without the stop string"""
    calls: Sequence[ToolCall]
    stop: str = ""
    """the agent's stop string that ended it"""


@dataclass(frozen=True)
class _Context:
    """A context after a turn of the policy."""

    keys: tuple[str, ...]
    """keys of the messages, the policy's last turn included"""
    tools: str
    prompt: Chat
    """the messages before the last turn, as they were rendered"""
    text: str
    """everything that was rendered and sampled, without the token that ends the turn"""
    ids: tuple[int, ...]
    reply: Reply


@dataclass(frozen=True)
class _Question:
    """A chat as the policy reads it."""

    keys: tuple[str, ...]
    tools: str
    prompt: Chat
    text: str
    """the rendered chat"""
    ids: tuple[int, ...]


class Conversation:
    """The contexts of one session.

    Args:
        policy: that of the session.
        strict: refuse requests whose sampling options differ from those that the policy is trained with, or whose fields are
            not supported.
    """

    def __init__(self, policy: Policy, strict: bool = True) -> None:
        self.policy, self.strict = policy, strict
        self.responses: dict[str, tuple[dict[str, Any], ...]] = {}
        """chats of the Responses API up to each response, by its id"""
        self._contexts: list[_Context] = []
        self._texts: list[tuple[str, tuple[int, ...]]] = []
        """plain texts that the policy has read and written, with their ids"""
        self._sampled: dict[tuple[str, ...], str] = {}
        """turns of the policy as they were sampled, by the key of the message that the agent got: alone, and after the keys of
        the messages before it, since two turns may differ in blanks alone"""

    def check(self, body: Mapping[str, Any], fields: Fields) -> None:
        """Check that a request asks for nothing that its answer would not have, if the session is strict."""
        if self.strict:
            check_distribution(body, self.policy.sampling)
            check_fields(body, fields)

    async def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], options: TurnOptions) -> Answer:
        """Return the policy's answer to a chat.

        Args:
            messages: in OpenAI's form.
            tools: functions that the template describes to the policy; with some, calls are found in the answer.
            options: of the turn.
        """
        asked = self._read(messages, tools)
        reply = await self.ask(asked.ids, options)
        raw = self._raw(reply)
        answer = _answer(reply, asked.ids, options.stop, bool(tools))
        key = _key(message_of(answer))
        self._sampled[key,] = self._sampled[*asked.keys, key] = raw
        self._contexts.append(
            _Context((*asked.keys, key), asked.tools, asked.prompt, asked.text + raw, asked.ids, reply)
        )
        return answer

    def count(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> int:
        """Return the number of tokens that the policy would read for a chat."""
        return len(self._read(messages, tools).ids)

    def _read(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> _Question:
        """Return what the policy reads for a chat."""
        if not messages:
            raise HttpError(400, "a chat must have at least one message")
        keys = tuple(_key(message) for message in messages)
        sampled = [self._sampled.get(keys[: i + 1], self._sampled.get((key,))) for i, key in enumerate(keys)]
        prompt: Chat = tuple(
            _plain(message) if text is None else {"role": "assistant", "content": text}
            for text, message in zip(sampled, messages, strict=True)
        )
        meta = {"tools": list(tools)} if tools else {}
        row = self.policy.encoder.prompt_row(Example(prompt, meta=meta, origin="the agent's request"))
        described = json.dumps(list(tools), sort_keys=True)
        ids = self._continue(keys, prompt, described, row.text, meta) or tuple(row.ids)
        return _Question(keys, described, prompt, row.text, ids)

    def _continue(
        self, keys: tuple[str, ...], prompt: Chat, tools: str, text: str, meta: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """Return the ids of a context that the chat continues, and of what is new; nothing if it continues none."""
        if prompt[-1]["role"] == "assistant":
            return ()  # a turn that the agent began itself
        fitting = [
            each
            for each in self._contexts
            if each.tools == tools and keys[: len(each.keys)] == each.keys and text.startswith(each.text)
        ]
        if not fitting:
            return ()
        context = max(fitting, key=lambda each: len(each.keys))
        new = Feedback(messages=prompt[len(context.keys) :])
        before = Example(context.prompt, meta=meta, origin="the agent's request")
        return (
            *context.ids,
            *context.reply.token_ids,
            *self.policy.encoder.feedback(before, new, context.reply.token_ids),
        )

    async def ask(self, ids: Sequence[int], options: TurnOptions) -> Reply:
        """Return the policy's turn after `ids`."""
        return await self.policy.ask(ids, options.max_tokens, options.stop, options.seed)

    async def complete(self, text: str, options: TurnOptions) -> Answer:
        """Return the policy's continuation of a plain text."""
        tokenizer = self.policy.encoder.tokenizer
        fitting = [each for each in self._texts if text.startswith(each[0])]
        if fitting:
            begun, ids = max(fitting, key=lambda each: len(each[0]))
            rest = text[len(begun) :]
            ids = (*ids, *(self.policy.encoder.feedback(Example(""), Feedback(text=rest), ()) if rest else ()))
        else:
            found = list(tokenizer(text)["input_ids"])
            ids = tuple(found[:-1] if found[-1:] == [tokenizer.eos_token_id] else found)
        reply = await self.ask(ids, options)
        answer = _answer(reply, ids, options.stop, tools=False)
        for written in (answer.content, reply.text):  # an agent may write the stop string again, or leave it out
            self._texts.append((text + written, (*ids, *reply.token_ids)))
        return answer

    def _raw(self, reply: Reply) -> str:
        """Return the turn as text with its special tokens, but for the one that ends it."""
        tokenizer = self.policy.encoder.tokenizer
        ids = list(reply.token_ids)
        if reply.finish == "stop" and ids[-1] in tokenizer.all_special_ids:
            ids = ids[:-1]
        return str(tokenizer.decode(ids, skip_special_tokens=False))


def message_of(answer: Answer) -> dict[str, Any]:
    """Return the assistant's message of an answer, in OpenAI's form."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {
                "id": f"call_{answer.reply.turn}_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for i, call in enumerate(answer.calls)
        ]
    return message


def _answer(reply: Reply, ids: tuple[int, ...], stop: Sequence[str], tools: bool) -> Answer:
    """Return the reply as the agent gets it."""
    text = reply.text
    found = [(text.find(each), each) for each in stop if reply.finish == "stop" and each in text]
    at, ended = min(found, default=(len(text), ""))  # a token may hold more text after a stop string
    content, calls = find_tool_calls(text[:at]) if tools else (text[:at], [])
    return Answer(reply, ids, content, calls, ended)


def _text_of(content: Any) -> str:
    """Return the text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise HttpError(400, "the content of a message must be a string, or a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text"):
            raise HttpError(400, "a message has a part that is not text, but this policy reads only text")
    return "".join(str(part.get("text", "")) for part in content)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as chat templates read it: contents as texts, arguments of calls as mappings."""
    if message.get("role") == "developer":
        message = {**message, "role": "system"}
    plain = {name: value for name, value in message.items() if value is not None} | {
        "content": _text_of(message.get("content"))
    }
    if message.get("tool_calls"):
        plain["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call)}} for call in message["tool_calls"]
        ]
    return plain


def _arguments(call: Mapping[str, Any]) -> Any:
    """Return the arguments of a call, read where they are JSON."""
    given = call["function"].get("arguments") or "{}"
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _key(message: Mapping[str, Any]) -> str:
    """Return what makes two messages the same, whatever client wrote them down."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise HttpError(400, "each message must have a role")
    try:
        calls = [[call["function"]["name"], _arguments(call)] for call in message.get("tool_calls") or ()]
    except (KeyError, TypeError):
        raise HttpError(400, "a tool call must have a function with a name and arguments") from None
    return json.dumps(
        [message["role"], _text_of(message.get("content")), calls, message.get("tool_call_id")], sort_keys=True
    )
