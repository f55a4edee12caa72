"""`--environment textarena --environment.game TowerOfHanoi-v0`: a game of TextArena for one player.

The rules and the board are the first message, whatever the row of data says; the row's seed decides the board.
"""

from __future__ import annotations

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

    async def drive(self, policy: Policy) -> Outcome:
        """Play until the game is over or a limit is reached; then what the game gives counts."""
        self.game.reset(num_players=1, seed=self.seed % 2**32)
        _, board = self.game.get_observation()
        dialogue = Dialogue(policy, Example(({"role": "user", "content": str(board)},), origin=self.example.origin))
        try:
            while True:
                reply = await dialogue.turn()
                done, _ = self.game.step(action=reply.text)
                if done:
                    break
                _, board = self.game.get_observation()
                dialogue.tell(Feedback(messages=({"role": "user", "content": str(board)},)))
        except EpisodeOver:
            pass
        rewards, _ = self.game.close()
        return Outcome(float((rewards or {}).get(0, 0.0)))
