"""The episodes of a batch while they are played, and the `Rollouts` that they become.

In the batch

* `tokens_NT` holds the tokens of the policy and of the environment, and `mask_NT` is true where the policy sampled;
* `sampler_logprobs_NT` and other numbers of the engine are zero at tokens of the environment;
* `turns_NT` is the number of the turn, from 0 (feedback has that of the turn that it answers), and `turns_N` counts turns;
* `environment_rewards_NT` has each turn's reward at the turn's last token, and rewards of tokens at these;
* `environment_scores_N` is the last score, or the sum of rewards where there is none;
* `environment_failed_N` is true where the environment or the agent failed;
* `environment/<name>_N` is a metric, added up over turns;
* `texts` is what the policy wrote, and `meta["transcript"]` lists turns and feedback.
"""

from __future__ import annotations

import time
from array import array
from asyncio import Semaphore
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Example, Finish, Prompts, Rollouts
from rlhf_core.contract.episode import Session
from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.lazy import torch
from rlhf_core.rollout.assemble import assemble
from rlhf_core.rollout.failures import Failures

if TYPE_CHECKING:
    from rlhf_core.contract.providers import Environment
    from rlhf_core.contract.run_view import RowEncoder

__all__ = ["EpisodeState", "EpisodeTable", "to_rollouts"]


@dataclass
class EpisodeState:
    """One episode, as far as it went."""

    prompt: int
    """the number of its prompt in the batch"""
    k: int
    """number of the completion among its prompt's"""
    session: Session
    tokens: array[int] = field(default_factory=lambda: array("q"))
    mask: array[int] = field(default_factory=lambda: array("b"))
    turns: array[int] = field(default_factory=lambda: array("q"))
    """the turn of each token"""
    rewards: array[float] = field(default_factory=lambda: array("d"))
    """reward of each token"""
    numbers: dict[str, array[float]] = field(default_factory=dict)
    """numbers that the engine returned for each token, by name"""
    kept_sets: list[KeptSets] = field(default_factory=list)
    """kept sets of each part, if the engine returned some"""
    texts: list[str] = field(default_factory=list)
    """texts of the policy's turns"""
    transcript: list[dict[str, Any]] = field(default_factory=list)
    score: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    finish: Finish | None = None
    """reason why it ended; None while it continues"""
    error: Exception | None = None
    """error that it failed with"""

    def append(
        self, tokens: Sequence[int], mask: Sequence[bool], turn: int, numbers: Mapping[str, list[float]]
    ) -> None:
        """Add tokens of a turn, and the engine's numbers for each."""
        self.tokens.extend(tokens)
        self.mask.extend(mask)
        self.turns.extend([turn] * len(tokens))
        self.rewards.extend([0.0] * len(tokens))
        for name, values in numbers.items():
            self.numbers.setdefault(name, array("d")).extend(values)

    def reward_tokens(self, last: int, rewards: Sequence[float]) -> None:
        """Add the rewards of the tokens up to the one at `last`."""
        for place, reward in enumerate(rewards, last + 1 - len(rewards)):
            self.rewards[place] += reward


class EpisodeTable:
    """All episodes of a batch, and the objects that play them."""

    def __init__(
        self, environment: Environment, prompts: Prompts, sampling: Sampling, limits: EpisodeLimits, encoder: RowEncoder
    ) -> None:
        self.environment = environment
        self.prompts = prompts
        self.sampling = replace(sampling, stop=(*sampling.stop, *environment.stop))
        self.limits = limits
        self.encoder = encoder
        self.deadline = time.monotonic() + limits.seconds if limits.seconds else None
        self.at_once: AbstractAsyncContextManager[Any] = Semaphore(limits.at_once) if limits.at_once else nullcontext()
        """semaphore that a coroutine of the environment holds while it works"""
        self.failures = Failures(limits.failures, len(prompts) * sampling.n)
        self.episodes: list[EpisodeState] = []
        self.sampled: list[Rollouts] = []
        """results of the engine, turn by turn"""

    @property
    def going(self) -> list[EpisodeState]:
        """Episodes that are not over."""
        return [each for each in self.episodes if each.finish is None]

    def example(self, episode: EpisodeState) -> Example:
        """The row of data that an episode began with."""
        return self.prompts.examples[episode.prompt]

    def time_left(self) -> float | None:
        """The seconds until no episode gets another turn; None without such a limit."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


def to_rollouts(table: EpisodeTable) -> Rollouts:
    """Put the episodes together as one batch."""
    episodes = table.episodes
    names = [name for name in table.sampled[0].extras if name.endswith("_NT")]
    rollouts = assemble(
        table.prompts,
        [each.tokens for each in episodes],
        [each.finish or "stop" for each in episodes],
        table.encoder.tokenizer,
        per_token={
            **{name: [each.numbers[name] for each in episodes] for name in names},
            "environment_rewards_NT": [each.rewards for each in episodes],
            "turns_NT": [each.turns for each in episodes],
        },
        scalars=_scalars(table.sampled),
        mask=[each.mask for each in episodes],
        texts=["".join(each.texts) for each in episodes],
        kept_sets=[KeptSets.join(each.kept_sets) for each in episodes]
        if any(each.kept_sets for each in episodes)
        else (),
    )
    extras = rollouts.extras
    for name in names:
        extras[name] = extras[name].to(table.sampled[0][name].dtype)
    extras["turns_NT"] = extras["turns_NT"].long()
    extras["turns_N"] = torch.tensor([each.turns[-1] + 1 for each in episodes])
    earned = [sum(each.rewards) if each.score is None else each.score for each in episodes]
    extras["environment_scores_N"] = torch.tensor(earned, dtype=torch.float32)
    extras["environment_failed_N"] = torch.tensor([each.finish == "error" for each in episodes])
    for name in table.environment.metrics:
        extras[f"environment/{name}_N"] = torch.tensor([each.metrics.get(name, 0.0) for each in episodes])
    meta: list[Mapping[str, Any]] = [
        {**row, "transcript": each.transcript} for row, each in zip(rollouts.meta, episodes, strict=True)
    ]
    return replace(rollouts, meta=meta)


def _scalars(sampled: Sequence[Rollouts]) -> dict[str, float]:
    """Return the engine's numbers for the whole batch; means over tokens are taken over the tokens of all turns."""
    scalars = dict(sampled[0].scalars)
    if "kept_mass" in scalars:
        tokens = [float(each.mask_NT.sum()) for each in sampled if "kept_mass" in each.scalars]
        kept = [each.scalars["kept_mass"] for each in sampled if "kept_mass" in each.scalars]
        scalars["kept_mass"] = sum(map(float.__mul__, kept, tokens)) / max(1.0, sum(tokens))
    return scalars
