"""Goal of an attack: a question and the answer that the attack wants."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Goal"]


@dataclass(frozen=True)
class Goal:
    """A question, and the beginning of the answer that the attack makes likely."""

    goal: str
    """the user's question; may be empty, so that the suffix is the whole message"""
    target: str = ""
    """beginning of the answer; may be empty only where an objective needs no target"""
    bad_set: tuple[str, ...] = ()
    """further answers of objective `bad_set`: the attack raises the probability that one of them, or the target, is given"""
    origin: str = ""
    """place of the goal for messages, such as `goals.csv:3`"""

    @property
    def answers(self) -> tuple[str, ...]:
        """The target and the bad set, without empty texts."""
        return tuple(text for text in (self.target, *self.bad_set) if text)

    @property
    def place(self) -> str:
        """Name of the goal for messages."""
        return self.origin or f"goal {self.goal[:40]!r}"
