"""Plays episodes: a role and an environment take turns, over any rollout engine.

All episodes of a batch take their turns together: one call of the engine samples a turn of every episode that
continues. Its prompts are then the first prompts with everything that followed. Token ids are never decoded and encoded
again: sampled ones stay as they are, and feedback is tokenized once and appended. `rlhf_core.rollout.episode_table`
    describes the batch.

An episode ends with a token of the policy: feedback after its last turn is in the transcript alone.

An environment that declares `drives` asks for turns itself (`rlhf_core.rollout.driving`).

Not here yet: sampling some episodes while the environment answers others, and images in feedback.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.contract.options import EpisodeLimits, RunConfig, Sampling, turn_uid
from rlhf_core.errors import ContractError
from rlhf_core.rollout import failures
from rlhf_core.rollout.assemble import decode, pad_id
from rlhf_core.rollout.checks import check_rollouts
from rlhf_core.rollout.driving import drive
from rlhf_core.rollout.episode_table import EpisodeState, EpisodeTable, to_rollouts
from rlhf_core.rollout.failures import describe, late_session
from rlhf_core.util.event_loop import LATE, results

if TYPE_CHECKING:
    from rlhf_core.contract.providers import Environment, Rollout
    from rlhf_core.contract.roles import Role
    from rlhf_core.contract.run_view import RowEncoder

__all__ = ["Sampler", "check_messages", "complete", "play"]

Sampler = Callable[[Prompts, Sampling], Rollouts]
"""Samples one role; `Rollout.session` gives it."""


class Rows(Protocol):
    """The data of a run."""

    @property
    def rows(self) -> Iterable[Example]:
        """The training rows."""
        ...

    @property
    def encoder(self) -> RowEncoder:
        """Return the encoder of their rows."""
        ...


def check_messages(config: RunConfig, data: Rows) -> None:
    """Check that the chat template writes messages after the turn that they answer, if the run's environment sends any.

    Raises:
        DataError: it does not.
    """
    environment: Environment | None = config.providers.get("environment")
    if environment is not None and environment.messages:
        example = data.rows[0] if isinstance(data.rows, Sequence) and data.rows else Example("Hello")
        data.encoder.feedback(example, Feedback(messages=({"role": "user", "content": "…"},)), (0,))


def complete(
    rollout: Rollout,
    environment: Environment | None,
    role: Role,
    prompts: Prompts,
    sampling: Sampling,
    limits: EpisodeLimits,
    encoder: RowEncoder,
) -> Rollouts:
    """Return completions of `prompts`: what the engine samples, or episodes if there is an environment.

    A rank without prompts takes part in the engine's first turn, with a token that it does not keep.
    """
    if not len(prompts):
        with rollout.session(role) as sample:
            return sample(_stand_in(encoder), replace(sampling, n=1, max_new_tokens=1)).rows([])
    if environment is None:
        return check_rollouts(rollout, prompts, sampling, rollout(role, prompts, sampling))
    with rollout.session(role) as sample:
        if environment.drives:
            return drive(sample, environment, prompts, sampling, limits, encoder)
        return play(sample, environment, prompts, sampling, limits, encoder)


def _stand_in(encoder: RowEncoder) -> Prompts:
    """Return a prompt of one token, for the engine alone: no reward and no environment sees it."""
    return Prompts(texts=[""], token_ids=[[pad_id(encoder.tokenizer)]], examples=[Example("")], uids=[0], images=[{}])


def play(
    sample: Sampler,
    environment: Environment,
    prompts: Prompts,
    sampling: Sampling,
    limits: EpisodeLimits,
    encoder: RowEncoder,
) -> Rollouts:
    """Play `sampling.n` episodes for each prompt.

    Args:
        sample: an engine with a role, open over all turns (`Rollout.session`).
        environment: makes a session for each completion.
        prompts: what the episodes begin with.
        sampling: how turns are drawn; `max_new_tokens` limits a whole episode, feedback included.
        limits: the other limits.
        encoder: tokenizes feedback; the one that tokenized the prompts.

    Raises:
        ContractError: the environment breaks its contract.
    """
    table = EpisodeTable(environment, prompts, sampling, limits, encoder)
    try:
        _open(table)
        while table.going:
            _respond(table, _take_turn(table, sample))
    finally:
        closed = results([episode.session.close() for episode in table.episodes], failures.CLOSING_SECONDS)
        if LATE in closed:
            failures.warn_unclosed(environment, closed.count(LATE))
    return to_rollouts(table)


# ----------------------------------------------------------------------------------------------------------------------
# the environment's side
# ----------------------------------------------------------------------------------------------------------------------


def _open(table: EpisodeTable) -> None:
    """Begin an episode for each completion. The completions of a prompt meet the same environment, so they can be compared."""
    prompts = table.prompts
    calls = [
        (example, "", partial(table.environment, example, table.sampling.seed_for(uid, -1)))
        for example, uid in zip(prompts.examples, prompts.uids, strict=True)
        for _ in range(table.sampling.n)
    ]
    for i, session in enumerate(_answers(table, calls, table.time_left())):
        if session is LATE:
            where = describe(table.environment, prompts.examples[i // table.sampling.n])
            session = _Failure(late_session(table.limits.seconds), f"in the {where}".rstrip(","))
        if isinstance(session, _Failure):
            table.failures.add(session.error, session.where)
            failed = EpisodeState(i // table.sampling.n, i % table.sampling.n, Session(), error=session.error)
            table.episodes.append(failed)  # it ends after the first turn, which is sampled for all
            continue
        if not isinstance(session, Session):
            raise _contract_error(
                table, prompts.examples[i // table.sampling.n], f"returned {session!r}, which is not a Session"
            )
        table.episodes.append(EpisodeState(i // table.sampling.n, i % table.sampling.n, session))


def _respond(table: EpisodeTable, actions: Sequence[Action]) -> None:
    """Let the environment answer the turns of the episodes that continue."""
    going = table.going
    calls = [
        (table.example(episode), f"turn {action.turn}", partial(_answer_of, episode, action))
        for episode, action in zip(going, actions, strict=True)
    ]
    for episode, action, answer in zip(going, actions, _answers(table, calls, table.time_left()), strict=True):
        if answer is LATE:
            episode.finish = "seconds"
            continue
        if isinstance(answer, _Failure):
            _fail(table, episode, action, answer)
            continue
        _take_feedback(table, episode, action, _check_feedback(table, episode, action, answer))


def _answer_of(episode: EpisodeState, action: Action) -> Any:
    """Let the session answer, if there is one."""
    return _Failure(episode.error, "") if episode.error is not None else episode.session.respond(action)


def _fail(table: EpisodeTable, episode: EpisodeState, action: Action, failure: _Failure) -> None:
    """End an episode whose environment failed; raise if there are too many."""
    error = failure.error
    if episode.error is None:
        table.failures.add(error, failure.where)
    episode.error, episode.finish = error, "error"
    text = f"{type(error).__name__}: {error}"
    episode.transcript.append({"from": "environment", "turn": action.turn, "error": text})


def _take_feedback(table: EpisodeTable, episode: EpisodeState, action: Action, feedback: Feedback) -> None:
    """Add what the environment answered to the episode, which may end here. Feedback that is not read is not added."""
    episode.rewards[-1] += feedback.reward
    episode.reward_tokens(len(episode.tokens) - 1, feedback.token_rewards)
    episode.score = episode.score if feedback.score is None else feedback.score
    for name, value in feedback.metrics.items():
        episode.metrics[name] = episode.metrics.get(name, 0.0) + value
    shown: Any = feedback.text or list(feedback.messages) or list(feedback.token_ids)
    if shown:
        episode.transcript.append({"from": "environment", "turn": action.turn, "text": shown})
    ids = [] if feedback.done else table.encoder.feedback(table.example(episode), feedback, action.token_ids)
    if feedback.done:
        episode.finish = "stop"
    elif len(episode.tokens) + len(ids) >= table.sampling.max_new_tokens:
        episode.finish = "length"  # no token would be left for another turn
    elif action.turn + 1 == table.limits.turns:
        episode.finish = "turns"
    elif table.time_left() == 0.0:
        episode.finish = "seconds"
    if episode.finish is not None:
        return
    nothing = {name: [0.0] * len(ids) for name in episode.numbers}
    episode.append(ids, [False] * len(ids), action.turn, nothing)
    if episode.kept_sets:
        episode.kept_sets.append(KeptSets.whole(len(ids)))


def _check_feedback(table: EpisodeTable, episode: EpisodeState, action: Action, feedback: object) -> Feedback:
    """Return `feedback` if it keeps the contract."""
    example, environment = table.example(episode), table.environment
    if not isinstance(feedback, Feedback):
        raise _contract_error(table, example, f"returned {feedback!r}, which is not a Feedback")
    if (bool(feedback.text), bool(feedback.messages), bool(feedback.token_ids)).count(True) > 1:
        raise _contract_error(table, example, "returned feedback with more than one of text, messages and token_ids")
    if feedback.messages and not environment.messages:
        raise _contract_error(
            table, example, "returned messages, but does not declare them; set `messages = True` in the class"
        )
    if len(feedback.token_rewards) not in (0, len(action.token_ids)):
        count = f"{len(feedback.token_rewards)} token_rewards for {len(action.token_ids)} tokens"
        raise _contract_error(table, example, f"returned {count}; give one for each token of the turn, or none")
    for name in feedback.metrics:
        if name not in environment.metrics:
            raise _contract_error(
                table, example, f"returned a metric {name!r} that is not in its `metrics`: {environment.metrics}"
            )
    return feedback


def _contract_error(table: EpisodeTable, example: Example, how: str) -> ContractError:
    return ContractError(f"{describe(table.environment, example)} {how}")


@dataclass(frozen=True)
class _Failure:
    """Exception that a call of the environment raised."""

    error: Exception
    where: str
    """names the episode"""


def _answers(
    table: EpisodeTable,
    calls: Sequence[tuple[Example, str, Callable[[], Any]]],
    seconds: float | None = None,
) -> list[Any]:
    """Return what the calls answer, awaited; `_Failure` for an exception, with a note of environment, example and turn."""

    def failed(error: Exception, example: Example, turn: str) -> _Failure:
        where = f"in the {describe(table.environment, example)} {turn}".rstrip(" ,")
        error.add_note(where)
        return _Failure(error, where)

    async def waited(answer: Awaitable[Any], example: Example, turn: str) -> Any:
        try:
            async with table.at_once:
                return await answer
        except Exception as error:
            return failed(error, example, turn)

    answers = []
    for example, turn, call in calls:
        try:
            answer = call()
        except Exception as error:
            answer = failed(error, example, turn)
        answers.append(waited(answer, example, turn) if isawaitable(answer) else answer)
    return results(answers, seconds)


# ----------------------------------------------------------------------------------------------------------------------
# the policy's side
# ----------------------------------------------------------------------------------------------------------------------


def _take_turn(table: EpisodeTable, sample: Sampler) -> list[Action]:
    """Sample a turn of every episode that continues. The first is requested like any completions, with the same seeds."""
    going, prompts, turn = table.going, table.prompts, len(table.sampled)
    left = [table.sampling.max_new_tokens - len(episode.tokens) for episode in going]
    limits = [min(each, table.limits.turn_tokens or each) for each in left]
    sampling = replace(table.sampling, max_new_tokens=max(limits))
    if turn:
        rows = [episode.prompt for episode in going]
        sampling = replace(sampling, n=1)
        prompts = replace(
            prompts.rows(rows),
            token_ids=[[*prompts.token_ids[each.prompt], *each.tokens] for each in going],
            uids=[turn_uid(prompts.uids[each.prompt], each.k, turn) for each in going],
            limits=limits,
        )
    sampled = sample(prompts, sampling)
    table.sampled.append(sampled)
    return [_add_turn(table, episode, sampled, i, limit, turn) for i, (episode, limit) in enumerate(zip(going, limits))]


def _add_turn(table: EpisodeTable, episode: EpisodeState, sampled: Rollouts, i: int, limit: int, turn: int) -> Action:
    """Add row `i` of what the engine sampled to its episode; what is longer than `limit` is cut."""
    length = min(int(sampled.lengths_N[i]), limit)
    tokens = sampled.tokens_NT[i, :length].tolist()
    text, finish = sampled.texts[i], sampled.finish[i]
    if length < int(sampled.lengths_N[i]):
        (text,), finish = decode(table.encoder.tokenizer, [tokens]), "length"
    numbers = {name: values[i, :length].tolist() for name, values in sampled.extras.items() if name.endswith("_NT")}
    episode.append(tokens, sampled.mask_NT[i, :length].tolist(), turn, numbers)
    if sampled.kept_sets:
        kept = sampled.kept_sets[i]
        if not isinstance(kept, KeptSets):
            raise ContractError("the rollout engine returned rules as kept sets of a turn: give sets, or none")
        episode.kept_sets.append(kept.cut(length))
    episode.texts.append(text)
    episode.transcript.append({"from": "policy", "turn": turn, "text": text})
    return Action(text, tuple(tokens), "stop" if finish == "stop" else "length", turn)
