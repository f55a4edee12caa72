"""One episode that an agent drives: its segments, and the row of a batch that they become."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.contract.batch import Finish
from rlhf_core.contract.driving import Outcome
from rlhf_core.contract.episode import Session
from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.errors import UsageError
from rlhf_core.rollout.episode_table import EpisodeState

__all__ = ["DrivenEpisode", "Turn"]


@dataclass(frozen=True)
class Turn:
    """A recorded turn of the policy."""

    number: int
    feedback: tuple[int, ...]
    """text between the previous turn and this one; empty at a segment's beginning"""
    tokens: list[int]
    mask: list[bool]
    numbers: dict[str, list[float]]
    """numbers that the engine returned for each token, by name"""
    kept_sets: KeptSets | None
    text: str


@dataclass
class Segment:
    """A context that grows: a prompt, and turns with the texts between them."""

    prompt: tuple[int, ...]
    ids: list[int]
    """the prompt and everything after it"""
    turns: list[Turn] = field(default_factory=list)


@dataclass
class DrivenEpisode:
    """An episode, as far as it went."""

    prompt: int
    """the number of its prompt in the batch"""
    k: int
    """number of the completion among its prompt's"""
    segments: list[Segment] = field(default_factory=list)
    recorded: int = 0
    """turns so far"""
    waiting: int = 0
    """turns that were requested and not answered yet"""
    finish: Finish | None = None
    """the limit that ended it, or `error`"""
    outcome: Outcome = field(default_factory=Outcome)
    error: BaseException | None = None
    is_over: bool = False
    """True once its agent has ended: a turn that is still sampled then belongs to no episode"""

    @property
    def asks(self) -> int:
        """Turns so far, and those that are waited for."""
        return self.recorded + self.waiting

    @property
    def length(self) -> int:
        """Tokens of its completion: all but the first segment's prompt."""
        return sum(len(each.ids) for each in self.segments) - (len(self.segments[0].prompt) if self.segments else 0)

    def end(self, outcome: Outcome) -> None:
        """Take what the episode earned.

        Raises:
            UsageError: rewards of tokens are not one for each token of a turn.
        """
        lengths = {turn.number: len(turn.tokens) for segment in self.segments for turn in segment.turns}
        for number, rewards in enumerate(outcome.token_rewards):
            if rewards and len(rewards) != lengths.get(number, 0):
                raise UsageError(
                    f"the agent returned {len(rewards)} token_rewards for turn {number}, which has "
                    f"{lengths.get(number, 0)} tokens; return one for each token, or none"
                )
        self.outcome = outcome

    def find_segment(self, ids: Sequence[int]) -> Segment | None:
        """Return the segment that an ask of these ids continues: the longest of those whose every token they begin with."""
        fitting = [
            each for each in self.segments if len(each.ids) <= len(ids) and each.ids == list(ids[: len(each.ids)])
        ]
        return max(fitting, key=lambda each: len(each.ids), default=None)

    def count_added(self, ids: Sequence[int]) -> int:
        """Return the number of unsampled tokens that a request for these ids adds to the completion."""
        segment = self.find_segment(ids)
        if segment is not None:
            return len(ids) - len(segment.ids)
        return len(ids) if self.segments else 0

    def record(self, ids: Sequence[int], turn: Turn) -> None:
        """Add a turn, sampled after `ids`."""
        segment = self.find_segment(ids)
        if segment is None:
            segment = Segment(tuple(ids), list(ids))
            self.segments.append(segment)
        feedback = tuple(ids[len(segment.ids) :])
        segment.ids += [*feedback, *turn.tokens]
        self.recorded += 1
        segment.turns.append(
            Turn(turn.number, feedback, turn.tokens, turn.mask, turn.numbers, turn.kept_sets, turn.text)
        )

    def to_state(
        self, session: Session, end: int, names: Sequence[str], tokenizer: Any
    ) -> tuple[EpisodeState, array[int]]:
        """Return the episode as one row, and the segment of each token. One without a turn is the token `end` alone, masked."""
        state, segments = EpisodeState(self.prompt, self.k, session), array("q")
        last: dict[int, int] = {}

        def foreign(ids: Sequence[int], turn: int, segment: int) -> None:
            state.append(ids, [False] * len(ids), turn, {name: [0.0] * len(ids) for name in names})
            segments.extend([segment] * len(ids))
            if ids and state.kept_sets:
                state.kept_sets.append(KeptSets.whole(len(ids)))
            if ids:
                text = tokenizer.decode(ids, skip_special_tokens=True)
                state.transcript.append({"from": "environment", "turn": turn, "text": text})

        for s, segment in enumerate(self.segments):
            foreign(segment.prompt if s else (), max(0, segment.turns[0].number - 1), s)
            for turn in segment.turns:
                foreign(turn.feedback, max(0, turn.number - 1), s)
                state.append(turn.tokens, turn.mask, turn.number, turn.numbers)
                segments.extend([s] * len(turn.tokens))
                last[turn.number] = len(state.tokens) - 1
                if turn.kept_sets is not None:
                    state.kept_sets.append(turn.kept_sets)
                state.texts.append(turn.text)
                state.transcript.append({"from": "policy", "turn": turn.number, "text": turn.text})
        if not self.segments:
            foreign([end], 0, 0)
        self._reward(state, last)
        return state, segments

    def _reward(self, state: EpisodeState, last: dict[int, int]) -> None:
        """Put what the episode earned to its tokens; `last` has the place of each turn's last token."""
        for number, reward in enumerate(self.outcome.turn_rewards):
            if number in last:
                state.rewards[last[number]] += reward
        for number, rewards in enumerate(self.outcome.token_rewards):
            if rewards:
                state.reward_tokens(last[number], rewards)
        state.rewards[-1] += self.outcome.reward
        state.score, state.finish = self.outcome.score, self.finish or "stop"
        state.metrics = dict(self.outcome.metrics)
        if self.error is not None:
            state.transcript.append({"from": "environment", "error": f"{type(self.error).__name__}: {self.error}"})
