"""`--environment tools --environment.factory tools.py:Shop`: a class whose public methods are tools, as TRL's users write them.

    class Shop:
        def reset(self, **row): ...                    # a row of data; may return a text for the policy
        def price(self, item: str) -> float: ...       # a tool: its docstring and type hints describe it
        def reward(self) -> float: ...                 # optional: of the episode

The chat template shows the tools to the policy, which writes `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. A turn
without a call is the answer. Where the class has no `reward`, choose one that scores what the policy wrote (`--reward func`,
for example).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core import Environment, EpisodeOver, Example, Feedback, Outcome, Policy, Session, UsageError
from rlhf_environment_adapters.dialogue import Dialogue, find_name

__all__ = ["Tools"]

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
NO_TOOLS = ("reset", "reward")


@dataclass(frozen=True)
class Tools(Environment):
    """A class of yours whose public methods are tools."""

    factory: str
    """file.py:Class or module:Class"""

    drives = True
    metrics = ("calls", "errors")

    def check(self) -> None:
        """Find the class. Raises `UsageError` if a tool cannot be described to the policy."""
        _schemas(_tools_of(find_name(self.factory)()))

    def __call__(self, example: Example, seed: int) -> Session:
        return ToolsSession(find_name(self.factory)(), example)


@dataclass
class ToolsSession(Session):
    """One episode, with an instance of its own."""

    instance: Any
    example: Example

    async def drive(self, policy: Policy) -> Outcome:
        """Answer calls until a turn has none."""
        tools, counts = _tools_of(self.instance), {"calls": 0.0, "errors": 0.0}
        if "reset" in dir(self.instance):
            told = self.instance.reset(prompt=self.example.prompt, label=self.example.label, **self.example.meta)
        else:
            told = None
        dialogue = Dialogue(policy, _with_tools(self.example, tools, told))
        try:
            while True:
                reply = await dialogue.turn()
                answers = [_answer(tools, text, counts) for text in CALL.findall(reply.text)]
                if not answers:
                    break
                dialogue.tell(Feedback(messages=tuple({"role": "tool", "content": answer} for answer in answers)))
        except EpisodeOver:
            pass  # the reward is of what was done before the limit
        reward = self.instance.reward() if "reward" in dir(self.instance) else 0.0
        return Outcome(float(reward), metrics=counts)


def _tools_of(instance: Any) -> dict[str, Callable[..., Any]]:
    methods = inspect.getmembers(instance, inspect.ismethod)
    return {name: method for name, method in methods if not name.startswith("_") and name not in NO_TOOLS}


def _schemas(tools: Mapping[str, Callable[..., Any]]) -> list[Any]:
    """Return the descriptions of tools for chat templates."""
    from transformers.utils import get_json_schema

    try:
        return [get_json_schema(tool) for tool in tools.values()]
    except Exception as error:  # the docstring or the type hints of the user's method
        raise UsageError(f"a tool cannot be described to the policy: {error}") from None


def _with_tools(example: Example, tools: Mapping[str, Callable[..., Any]], told: object) -> Example:
    """Return the prompt as a chat that names the tools, and with what `reset` returned."""
    chat = ({"role": "user", "content": example.prompt},) if isinstance(example.prompt, str) else example.prompt
    if isinstance(told, str) and told:
        chat = (*chat[:-1], {**chat[-1], "content": f"{chat[-1]['content']}{told}"})
    return Example(chat, label=example.label, meta={**example.meta, "tools": _schemas(tools)}, origin=example.origin)


def _answer(tools: Mapping[str, Callable[..., Any]], text: str, counts: dict[str, float]) -> str:
    """Return what a tool returns, or what was wrong with the call."""
    counts["calls"] += 1
    try:
        call = json.loads(text)
        return str(tools[call["name"]](**call.get("arguments", {})))
    except Exception as error:  # the policy's call, and the user's tool: the policy is told, and may try again
        counts["errors"] += 1
        return f"{type(error).__name__}: {error}"
