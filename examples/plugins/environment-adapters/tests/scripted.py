"""A policy that follows a script, and an episode with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from rlhf_core import Environment, EpisodeOver, Example, Feedback, Outcome, Reply, Sampling


class Letters:
    """An encoder whose ids are letters; messages stand as [role]content."""

    tokenizer = staticmethod(lambda text, **options: {"input_ids": list(text)})

    def prompt_row(self, example: Example) -> Any:
        prompt = example.prompt
        text = prompt if isinstance(prompt, str) else "".join(f"[{m['role']}]{m['content']}" for m in prompt)
        tools = len(example.meta.get("tools", ()))
        text = f"{tools} tools: {text}" if tools else text
        return SimpleNamespace(text=text, ids=list(text))

    def feedback(self, example: Example, feedback: Feedback, turn_ids: Sequence[int]) -> list[str]:
        return list(feedback.text or "".join(f"[{m['role']}]{m['content']}" for m in feedback.messages))


class Script:
    """A policy that writes its lines in turn and remembers what it read."""

    def __init__(self, *lines: str) -> None:
        self.encoder: Any = Letters()
        self.sampling = Sampling()
        self.lines = list(lines)
        self.read: list[str] = []
        self.asked: list[tuple[int, tuple[str, ...], int | None]] = []
        """options of each turn"""

    async def ask(
        self, token_ids: Any, max_tokens: int = 0, stop: Sequence[str] = (), seed: int | None = None
    ) -> Reply:
        self.asked.append((max_tokens, tuple(stop), seed))
        if not self.lines:
            raise EpisodeOver("turns", "no more turns")
        self.read.append("".join(token_ids))
        line = self.lines.pop(0)
        return Reply(line, tuple(line), tuple(-1.0 for _ in line), "stop", len(self.read) - 1)  # type: ignore[arg-type]


def play(environment: Environment, policy: Any, example: Example | None = None) -> Outcome:
    async def episode() -> Outcome:
        session: Any = environment(example or Example("Two?", label="2"), 7)
        try:
            return await session.drive(policy)
        finally:
            if asyncio.iscoroutine(closing := session.close()):
                await closing

    return asyncio.run(episode())
