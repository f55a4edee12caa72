"""The check of environments: sessions that stand alone, feedback that keeps the contract, and episodes with a tiny policy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Example, Rollouts
from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.lazy import torch
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.util.event_loop import results

if TYPE_CHECKING:
    from rlhf_core.contract.providers import Environment

__all__ = ["check_environment"]

TURNS = ("Yes.", "", "2+2=", "I do not know")
"""Turns of a policy that knows nothing of the environment."""
SAMPLING = Sampling(n=3, max_new_tokens=80, seed=7)
LIMITS = EpisodeLimits(turns=3, turn_tokens=6)


def check_environment(
    environment: Environment, examples: Sequence[Example] = (), turns: Sequence[str] = TURNS
) -> Rollouts:
    """Check that the same turns get the same feedback whatever other sessions do, and play episodes with a tiny policy.

    Args:
        environment: the provider.
        examples: rows of data that it can work with; two plain questions if absent.
        turns: what a policy writes, turn by turn; choose some that the environment understands. An environment that drives gets
            none.

    Returns:
        The episodes that the tiny policy played, for checks of your own.

    Raises:
        AssertionError: the environment breaks its contract.
    """
    check_provider(environment)
    name = type(environment).__qualname__
    if environment.drives:
        turns = ()
    examples = examples or [Example("What is 2+2?", label="4"), Example("And 3*3?", label="9")]
    for example in examples:
        sessions = results([environment(example, 1) for _ in range(3)])
        for session in sessions:
            assert isinstance(session, Session), f"{name} must return a Session, not {type(session).__name__}"
        alone, first, other = sessions
        expected = list(_converse(environment, alone, turns))
        crossed = zip_longest(
            expected,
            _converse(environment, first, turns),
            _converse(environment, other, turns[::-1]),  # another episode in between, with other turns
        )
        for i, (known, answer, _) in enumerate(crossed):
            assert i >= len(expected) or answer == known, (
                f"{name} must answer the same turns in the same way, whatever other sessions do: {known}, then {answer}"
            )
        results([session.close() for session in sessions])
    played, again = _play(environment, examples), _play(environment, examples)
    for column in ("environment_rewards_NT", "turns_NT"):
        assert torch.equal(played[column], again[column]), f"{name} must give the same {column} for the same seed"
    return played


def _converse(environment: Environment, session: Session, turns: Sequence[str]) -> Iterator[Feedback]:
    """Take turns until the environment ends the episode; each answer is checked."""
    name = type(environment).__qualname__
    for turn, text in enumerate(turns):
        (feedback,) = results([session.respond(Action(text, (*text.encode(), 0), "stop", turn))])
        assert isinstance(feedback, Feedback), f"{name} must answer with Feedback, not {type(feedback).__name__}"
        given = [each for each in (feedback.text, feedback.messages, feedback.token_ids) if each]
        assert len(given) <= 1, f"{name} must give one of text, messages and token_ids"
        assert not feedback.messages or environment.messages, f"{name} gives messages: declare `messages = True`"
        assert math.isfinite(feedback.reward), f"{name} gave the reward {feedback.reward}"
        assert len(feedback.token_rewards) in (0, len(text.encode()) + 1), (
            f"{name} gave {len(feedback.token_rewards)} token_rewards for {len(text.encode()) + 1} tokens"
        )
        assert feedback.score is None or 0 <= feedback.score <= 1, (
            f"{name} gave a score of {feedback.score}, not 0 to 1"
        )
        unknown = sorted(set(feedback.metrics) - set(environment.metrics))
        assert not unknown, f"{name} gives a metric {unknown[0]!r} that is not among its `metrics`"
        yield feedback
        if feedback.done:
            return


def _play(environment: Environment, examples: Sequence[Example]) -> Rollouts:
    """Play episodes with a tiny policy."""
    from rlhf_core.rollout.episodes import complete
    from rlhf_core.rollout.hf import HuggingFaceRollout
    from rlhf_core.training.local_role import LocalRole

    run = tiny_run("unused", environment=environment)
    role: Any = LocalRole(run.plan, "actor")
    prompts = run.encoder.prompts(examples, range(len(examples)))
    return complete(HuggingFaceRollout(), environment, role, prompts, SAMPLING, LIMITS, run.encoder)
