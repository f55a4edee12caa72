"""`--environment textarena --environment.game TowerOfHanoi-v0`: a game of TextArena for one player.

The rules and the board are the first message, whatever the row of data says; the row's seed decides the board. Most games
repeat everything that they have shown before. The policy has read that, so each later message holds the new part alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlhf_core import Environment, EpisodeOver, Example, Feedback, Outcome, Policy, Session
from rlhf_environment_adapters.dialogue import Dialogue, require

__all__ = ["TextArena"]

PACKAGE = "rlhf-environment-adapters[textarena]"


@dataclass(frozen=True)
class TextArena(Environment):
    """A game of TextArena for one player."""

    game: str = "TowerOfHanoi-v0"
    """name of the game"""

    drives = True

    def check(self) -> None:
        """Find the package."""
        require("textarena", PACKAGE)

    def __call__(self, example: Example, seed: int) -> Session:
        return GameSession(require("textarena", PACKAGE).make(self.game), example, seed)


@dataclass
class GameSession(Session):
    """One game."""

    game: Any
    example: Example
    seed: int
    generator: Any = None
    """state of Python's global random generator as this game left it"""

    async def drive(self, policy: Policy) -> Outcome:
        """Play until the game is over or a limit is reached; then what the game gives counts."""
        with self._own_random():
            self.game.reset(num_players=1, seed=self.seed % 2**32)
        shown = self._look()
        dialogue = Dialogue(policy, Example(({"role": "user", "content": shown},), origin=self.example.origin))
        try:
            while True:
                reply = await dialogue.turn()
                with self._own_random():
                    done, _ = self.game.step(action=reply.text)
                if done:
                    break
                before, shown = shown, self._look()
                new = shown.removeprefix(before) or shown
                dialogue.tell(Feedback(messages=({"role": "user", "content": new},)))
        except EpisodeOver:
            pass
        rewards, _ = self.game.close()
        return Outcome(float((rewards or {}).get(0, 0.0)))

    def _look(self) -> str:
        """Return what the game shows to the player."""
        return str(self.game.get_observation()[1])

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Give the game its own random numbers. Games seed and read Python's global generator, which all episodes share."""
        outer = random.getstate()
        if self.generator is not None:
            random.setstate(self.generator)
        try:
            yield
        finally:
            self.generator = random.getstate()
            random.setstate(outer)
