"""`--environment harness`: an agent in its own program asks the policy over HTTP, and is trained as it is.

    def agent(base_url, api_key, example):
        client = openai.OpenAI(base_url=base_url, api_key=api_key)
        answer = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": example.prompt}])
        return float(example.label in answer.choices[0].message.content)

The function (or coroutine, or command) plays one episode and returns its reward. The policy reads exactly what the
agent sends.
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.driving import EpisodeOver, Outcome, Policy
from rlhf_core.contract.episode import Session
from rlhf_core.contract.providers import Environment
from rlhf_core.contract.ranges import at_least
from rlhf_core.endpoint.agents import call_function, outcome_of, run_command
from rlhf_core.endpoint.server import Deadlines, Endpoint
from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.reward.calls import load_function

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.contract.engines import OpenContext

__all__ = ["Harness"]


@dataclass(frozen=True)
class Harness(Environment):
    """An agent that asks the policy over HTTP, as OpenAI's or Anthropic's clients do."""

    agent: str | Callable[..., Any] = ""
    """function that plays an episode and returns its reward, as file.py:function or module:function; from Python the
    function itself"""
    command: str = ""
    """command that plays an episode, in place of a function; the last line it prints is the reward, as JSON"""
    seconds: float = 600.0
    """seconds after which an agent is stopped and its episode ends"""
    turn_seconds: float = 600.0
    """seconds after which a request for a turn is answered with an error"""
    request_sampling: Literal["refuse", "ignore"] = "refuse"
    """answer to a request with an option that changes the distribution and is not the run's, such as a temperature, or with a
    field that the endpoint does not support: refuse returns an error, ignore samples with `--sampling` all the same"""
    log: tuple[str, ...] = ()
    """names of numbers that the agent returns as metrics, logged as reward/<name>"""

    drives = True

    def __post_init__(self) -> None:
        at_least(0.001, self, "seconds", "turn_seconds")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the agent's metrics."""
        return self.log

    def check(self) -> None:
        """Find the function or the command.

        Raises:
            UsageError: there is none, or there are two.
        """
        if bool(self.agent) == bool(self.command):
            raise UsageError(
                f"the environment harness needs one agent; pass {option('agent', 'FILE.py:FUNCTION')} or "
                f"{option('command', 'COMMAND')}"
            )
        if self.command:
            words = shlex.split(self.command)
            if not words or shutil.which(words[0]) is None:
                raise OptionError("command", f"{self.command!r}: there is no such program")
            return
        self.function()

    def function(self) -> Callable[..., Any]:
        """Return the agent's function."""
        if not isinstance(self.agent, str):
            return self.agent
        path, _, name = self.agent.rpartition(":")
        if path.endswith(".py"):
            return load_function(path, name, "agent")
        return load_function(self.agent, "agent", "agent")

    def open(self, context: OpenContext) -> HarnessEngine:
        """Return an engine that serves when episodes begin."""
        return HarnessEngine(self)

    def __call__(self, example: Example, seed: int) -> Session:
        return HarnessEngine(self)(example, seed)


class HarnessEngine(Environment):
    """Server of sessions: one endpoint per event loop of episodes, open while it has episodes.

    Args:
        harness: the options.
    """

    drives = True

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.function = None if harness.command else harness.function()
        self._endpoints: dict[asyncio.AbstractEventLoop, _Use] = {}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the agent's metrics."""
        return self.harness.log

    def __call__(self, example: Example, seed: int) -> Session:
        return HarnessSession(self, example, seed)

    def close(self) -> None:
        """Nothing is open between two batches of episodes."""

    @asynccontextmanager
    async def endpoint(self) -> AsyncIterator[Endpoint]:
        """Hold the endpoint of this event loop; the last one who does closes it."""
        loop = asyncio.get_running_loop()
        use = self._endpoints.setdefault(loop, _Use(Endpoint(Deadlines(turn=self.harness.turn_seconds))))
        use.sessions += 1
        try:
            async with use.lock:
                if not use.endpoint.port:
                    await use.endpoint.start()
            yield use.endpoint
        finally:
            use.sessions -= 1
            if not use.sessions:
                self._endpoints.pop(loop, None)
                await use.endpoint.close()


@dataclass
class _Use:
    """An endpoint, and how many sessions it serves."""

    endpoint: Endpoint
    sessions: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class HarnessSession(Session):
    """One episode: a URL and a token, and the agent that is given them."""

    engine: HarnessEngine
    example: Example
    seed: int

    async def drive(self, policy: Policy) -> Outcome:
        """Run the agent until it ends, or its time is up."""
        harness, function = self.engine.harness, self.engine.function
        strict = harness.request_sampling == "refuse"
        async with self.engine.endpoint() as endpoint, endpoint.session(policy, strict) as address:
            try:
                async with asyncio.timeout(harness.seconds) as timer:
                    if function is None:
                        raw = await run_command(harness.command, address, self.example, self.seed)
                    else:
                        raw = await call_function(function, address, self.example, self.seed)
            except TimeoutError:
                if timer.expired():
                    raise EpisodeOver("seconds", f"the agent took longer than {harness.seconds:g} s") from None
                raise
        return outcome_of(raw, harness.log)
