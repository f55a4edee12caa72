"""`--environment openenv --environment.url http://localhost:8000`: an OpenEnv server, with two functions of yours between.

def to_action(text): return {"message": text}          # what the policy wrote, as an action
def to_text(observation): return observation["text"]   # an observation, as the policy reads it
"""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass
from typing import Any

from rlhf_core import Environment, EpisodeOver, Example, Feedback, Outcome, Policy, Session
from rlhf_environment_adapters.dialogue import Dialogue, find_name, require

__all__ = ["OpenEnv"]

PACKAGE = "rlhf-environment-adapters[openenv]"


@dataclass(frozen=True)
class OpenEnv(Environment):
    """A server of OpenEnv."""

    url: str
    """address of the server"""
    to_action: str
    """file.py:function or module:function: what the policy wrote, as an action"""
    to_text: str
    """file.py:function or module:function: an observation, as the policy reads it"""
    client: str = "openenv.core.generic_client:GenericEnvClient"
    """Python class of the client as module:class; it is constructed with base_url"""
    seconds: float = 120.0
    """time limit of one call to the server, in seconds"""

    drives = True

    def check(self) -> None:
        """Find the client and the functions."""
        for place in (self.client, self.to_action, self.to_text):
            self.find(place)

    def find(self, place: str) -> Any:
        """Return what `place` names; the client's package may be missing."""
        module = place.partition(":")[0]
        if place == self.client and not module.endswith(".py"):
            require(module, PACKAGE)
        return find_name(place)

    def __call__(self, example: Example, seed: int) -> Session:
        return ServerSession(self, example, seed, self.find(self.client)(base_url=self.url))


@dataclass
class ServerSession(Session):
    """One episode, with a client of its own."""

    environment: OpenEnv
    example: Example
    seed: int
    client: Any

    async def drive(self, policy: Policy) -> Outcome:
        """Step until the server says that the episode is over."""
        options = self.environment
        to_action, to_text = options.find(options.to_action), options.find(options.to_text)
        result = await self._call("reset", seed=self.seed % 2**32)
        first = Example(({"role": "user", "content": to_text(result.observation)},), origin=self.example.origin)
        dialogue, rewards = Dialogue(policy, first), list[float]()
        try:
            while not result.done:
                reply = await dialogue.turn()
                result = await self._call("step", to_action(reply.text))
                rewards.append(float(result.reward or 0.0))
                if not result.done:
                    dialogue.tell(Feedback(messages=({"role": "user", "content": to_text(result.observation)},)))
        except EpisodeOver:
            pass
        return Outcome(turn_rewards=rewards)

    async def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call the client, whose methods may block or be coroutines."""
        method = getattr(self.client, name)
        async with asyncio.timeout(self.environment.seconds):
            if inspect.iscoroutinefunction(method):
                return await method(*arguments, **options)
            result = await asyncio.to_thread(method, *arguments, **options)
            return await result if inspect.isawaitable(result) else result

    async def close(self) -> None:  # type: ignore[override]  # the base's may be a coroutine
        """Close the client."""
        await self._call("close")
