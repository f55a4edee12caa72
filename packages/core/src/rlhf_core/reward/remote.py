"""`--reward remote`: a reward server, `rlhf-run serve-reward MODEL` or any that speaks OpenRLHF's format.

A question is `{"query": […], "prompts": […], "labels": […]}`, prompts as the policy saw them and queries with the
completion after them; in addition to these go `raw_prompts`, `completions` and `ids`, which OpenRLHF's servers ignore.
An answer is `{"rewards": […]}`, with `scores`, `extra_logs` and the `ids` if the server likes. A reward `null` abstains.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rlhf_core.config.value_types import Secret, reveal
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import OptionError
from rlhf_core.lazy import torch
from rlhf_core.reward.calls import Answer, answer_of
from rlhf_core.reward.http import Replicas
from rlhf_core.util.threads import map_in_threads

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext

__all__ = ["Remote"]


@dataclass(frozen=True)
class Remote(Reward):
    """A reward server over HTTP, or several replicas of it; speaks OpenRLHF's format."""

    url: tuple[str, ...]
    """addresses; several are replicas that are asked in turn, and a dead one is skipped"""
    token: Annotated[str, Secret()] = ""
    """bearer token; env:NAME reads it from the environment"""
    timeout: float = 180.0
    """time limit of one whole answer, in seconds"""
    tries: int = 5
    """number of failures of all servers on one question before the run stops"""
    backoff: float = 1.0
    """seconds before the second try, doubled for each further try"""
    batch: int = 16
    """number of samples per request"""
    parallel: int = 4
    """number of requests in progress at the same time, per address"""

    def open(self, context: OpenContext) -> RemoteEngine:
        """Look at the addresses and the token; the servers may still be starting."""
        return RemoteEngine(self)


class RemoteEngine:
    """The servers, and which of them have failed.

    Args:
        reward: their options.
    """

    def __init__(self, reward: Remote) -> None:
        self.reward = reward
        self.replicas = Replicas(reward.url, reveal(reward.token), reward.timeout, reward.tries, reward.backoff)

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        N, size = len(rollouts), self.reward.batch
        parts = [range(start, min(start + size, N)) for start in range(0, N, size)]
        count = self.reward.parallel * len(self.reward.url)
        answers = map_in_threads(lambda rows: _ask(self.replicas, rollouts, rows), parts, count)
        rewards = [reward for answer in answers for reward in answer.rewards]
        scores = [score or 0.0 for answer in answers for score in answer.scores or ()]
        names = dict.fromkeys(name for answer in answers for name in answer.logs)
        return RewardOutput(
            rewards_N=torch.tensor([reward or 0.0 for reward in rewards]),
            scores_N=torch.tensor(scores) if len(scores) == N else None,
            metrics={
                name: torch.tensor([value for answer in answers for value in answer.logs[name]])
                for name in names
                if all(name in answer.logs for answer in answers)
            },
            abstained_N=torch.tensor([reward is None for reward in rewards]) if None in rewards else None,
        )

    def close(self) -> None:
        """Nothing is open between calls."""


def _ask(replicas: Replicas, rollouts: Rollouts, rows: range) -> Answer:
    """The answer for some rows, checked to be about them."""
    ids = list(rows)
    question: dict[str, Any] = {
        "query": [rollouts.prompts[i] + rollouts.texts[i] for i in rows],
        "prompts": [rollouts.prompts[i] for i in rows],
        "labels": [rollouts.labels[i] for i in rows],
        "raw_prompts": [rollouts.meta[i].get("prompt") for i in rows],
        "completions": [rollouts.texts[i] for i in rows],
        "ids": ids,
    }
    raw = replicas.ask(question)
    if isinstance(raw, dict) and raw.get("ids", ids) != ids:
        answered, asked = reprlib.repr(raw["ids"]), reprlib.repr(ids)
        raise OptionError("url", f": a server answered for samples {answered}, but the request was for {asked}")
    try:
        return answer_of(raw, len(ids))
    except (ValueError, TypeError) as error:
        raise OptionError("url", f": a server {error}") from None
