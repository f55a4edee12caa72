"""Parse and validate requests to `serve-reward`. A wrong request gets a 4xx status and a one-line error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rlhf_core.data.chats import to_chat

__all__ = ["BadRequest", "Sample", "read_json", "samples_of"]


class BadRequest(Exception):
    """A request that cannot be answered.

    Args:
        status: of HTTP, 400 to 499.
        message: one line for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Sample:
    """Sample to score."""

    query: str
    """prompt and completion as the policy saw them"""
    prompt: Any = None
    """the prompt as the data had it, text or messages; absent from OpenRLHF's clients"""
    completion: str = ""


async def read_json(request: Any, max_body: int, seconds: float) -> Any:
    """Return the JSON body of a request (of Starlette).

    Raises:
        BadRequest: it has no length or too many bytes, does not arrive in time, or is not JSON.
    """
    length = request.headers.get("content-length", "")
    if not length:
        raise BadRequest(411, "a request must state its length in Content-Length")
    if not (length.isascii() and length.isdigit()):
        raise BadRequest(400, "Content-Length is not a number")
    if len(length) > 18 or int(length) > max_body:
        raise BadRequest(413, f"a request can have at most {max_body} bytes")
    try:
        body = await asyncio.wait_for(request.body(), seconds)
    except TimeoutError:
        raise BadRequest(408, f"the body did not arrive within {seconds:g} s") from None
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadRequest(422, "the JSON is nested too deeply") from None
    except ValueError as error:  # no JSON, no Unicode, a number of thousands of digits
        raise BadRequest(422, f"the body is not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def samples_of(body: Any) -> list[Sample]:
    """Return the samples of a request.

    Raises:
        BadRequest: states the form of a request.
    """
    if not isinstance(body, dict) or "query" not in body:
        raise BadRequest(422, 'expected {"query": [texts], "prompts": [texts], "labels": [anything]}')
    queries = _texts("query", [body["query"]] if isinstance(body["query"], str) else body["query"])
    prompts, completions = body.get("raw_prompts"), body.get("completions")
    prompts = [None] * len(queries) if prompts is None else prompts
    completions = [""] * len(queries) if completions is None else _texts("completions", completions)
    ids = body.get("ids", [0] * len(queries))
    for name, values in (("raw_prompts", prompts), ("ids", ids)):
        if not isinstance(values, list):
            raise BadRequest(422, f"{name!r} should be a list")
    if not len(queries) == len(prompts) == len(completions) == len(ids):
        raise BadRequest(422, "'query', 'raw_prompts', 'completions' and 'ids' should have the same length")
    for each in ids:
        if not isinstance(each, (int, str)):
            raise BadRequest(422, "'ids' should be whole numbers or strings")
        _check_unicode("ids", each)
    return [Sample(query, _prompt(prompt), said) for query, prompt, said in zip(queries, prompts, completions)]


def _texts(name: str, values: Any) -> Sequence[str]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise BadRequest(422, f"{name!r} should be a list of strings")
    for value in values:
        _check_unicode(name, value)
    return values


def _prompt(prompt: Any) -> Any:
    _check_unicode("raw_prompts", prompt)
    if prompt is None or isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise BadRequest(422, "'raw_prompts' should be strings or lists of messages")
    try:
        return to_chat(prompt)
    except ValueError as error:
        raise BadRequest(422, f"raw_prompts: {error}") from None


def _check_unicode(name: str, value: Any) -> None:
    """Refuse half a surrogate pair, anywhere in a value of JSON: no tokenizer can read it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest(422, f"{name!r} has half of a surrogate pair, which is not valid Unicode") from None
