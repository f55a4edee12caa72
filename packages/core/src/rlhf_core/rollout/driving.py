"""Plays episodes that agents drive, over any rollout engine.

Sessions run as coroutines in one event loop. The thread that called samples their turns: those of many episodes together, as
`AskQueue` gathers them. A turn's seed follows from the prompt, the completion and the number of the turn, so the numbers do
not depend on which turns were sampled together. `rlhf_core.rollout.driven_episode` turns an episode into a row.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import replace
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.driving import EpisodeOver, Outcome, Reply
from rlhf_core.contract.episode import Session
from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.contract.options import EpisodeLimits, Sampling, turn_uid
from rlhf_core.errors import ContractError, UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.rollout import failures
from rlhf_core.rollout.asking import Ask, AskQueue, SampledRow
from rlhf_core.rollout.assemble import decode
from rlhf_core.rollout.driven_episode import DrivenEpisode, Turn
from rlhf_core.rollout.episode_table import EpisodeTable, to_rollouts
from rlhf_core.rollout.failures import describe, late_session
from rlhf_core.util.event_loop import start

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rlhf_core.contract.providers import Environment
    from rlhf_core.contract.run_view import RowEncoder

__all__ = ["drive"]


def drive(
    sample: Callable[[Prompts, Sampling], Rollouts],
    environment: Environment,
    prompts: Prompts,
    sampling: Sampling,
    limits: EpisodeLimits,
    encoder: RowEncoder,
) -> Rollouts:
    """Let the environment's sessions drive `sampling.n` episodes for each prompt.

    Args:
        sample: an engine with a role, open over all turns (`Rollout.session`).
        environment: makes a session for each completion.
        prompts: the rows of data; what the policy reads first is up to the agent.
        sampling: how turns are drawn; `max_new_tokens` limits a whole episode, feedback included.
        limits: the other limits.
        encoder: of the rows.

    Raises:
        ContractError: the environment breaks its contract.
        UsageError: more episodes failed than the limits allow, or the rows have images.
    """
    if any(prompts.images):
        raise UsageError("rows have images, but agents that drive episodes read only text; pass rows without images")
    table = EpisodeTable(environment, prompts, sampling, limits, encoder)
    player = _Player(table)
    played = start(player.play())
    played.add_done_callback(lambda _: player.queue.close())
    try:
        while (taken := player.queue.take()) is not None:
            player.queue.give(taken, _sample(table, sample, [each.ask for each in taken]))
    except BaseException:
        player.cancel()
        wait([played], timeout=2 * failures.CLOSING_SECONDS)
        raise
    played.result()
    return player.rollouts()


def _sample(table: EpisodeTable, sample: Callable[[Prompts, Sampling], Rollouts], asks: Sequence[Ask]) -> Rollouts:
    """Sample a turn for each ask."""
    n = table.sampling.n
    rows = table.prompts.rows([each.episode // n for each in asks])
    limits = [each.limit for each in asks]
    prompts = replace(
        rows, token_ids=[list(each.token_ids) for each in asks], uids=[each.uid for each in asks], limits=limits
    )
    stop = (*table.sampling.stop, *asks[0].stop)
    sampled = sample(prompts, replace(table.sampling, n=1, max_new_tokens=max(limits), stop=stop))
    table.sampled.append(sampled)
    return sampled


class _Player:
    """The event loop's side: all episodes of a batch."""

    def __init__(self, table: EpisodeTable) -> None:
        self.table = table
        self.queue = AskQueue(table.limits.gather)
        n = table.sampling.n
        self.episodes = [DrivenEpisode(i // n, i % n) for i in range(len(table.prompts) * n)]
        self.failures = table.failures
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """End all episodes, from another thread."""
        self._cancelled = True
        if self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def play(self) -> None:
        """Run all episodes."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self._cancelled:
            return
        at_once = asyncio.Semaphore(self.table.limits.at_once or len(self.episodes))
        tasks = [asyncio.ensure_future(self._run(each, at_once)) for each in self.episodes]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self.queue.close()

    async def _run(self, episode: DrivenEpisode, at_once: asyncio.Semaphore) -> None:
        """Run one episode. An exception of its agent ends only this episode, as long as few fail."""
        async with at_once:
            self.queue.add_episode()
            try:
                await self._drive(episode)
            except EpisodeOver as over:
                episode.finish = episode.finish or over.finish
            except ContractError:
                raise
            except Exception as error:
                if episode.finish is None:  # else it failed because its limit was reached
                    self._fail(episode, error)
            finally:
                episode.is_over = True
                self.queue.remove_episode()
        if not episode.segments and episode.error is None:
            self._fail(episode, UsageError("the agent ended without asking the policy for a turn"))

    def _fail(self, episode: DrivenEpisode, error: Exception) -> None:
        """Note a failed episode; raise if there are too many."""
        where = f"in the {describe(self.table.environment, self._example(episode))} turn {episode.asks}"
        error.add_note(where)
        episode.finish, episode.error = "error", error
        self.failures.add(error, where)

    async def _drive(self, episode: DrivenEpisode) -> None:
        """Make the session, and let it drive until its end or the time limit."""
        table = self.table
        uid = table.prompts.uids[episode.prompt]
        session = table.environment(self._example(episode), table.sampling.seed_for(uid, -1))
        if isawaitable(session):
            try:
                async with asyncio.timeout(table.time_left()) as timer:
                    session = await session
            except TimeoutError:
                if timer.expired():
                    raise late_session(table.limits.seconds) from None
                raise
        if not isinstance(session, Session):
            raise ContractError(
                f"{describe(table.environment, self._example(episode))} returned {session!r}, which is not a Session"
            )
        try:
            async with asyncio.timeout(table.time_left()) as timer:
                outcome = await session.drive(_EpisodePolicy(self, episode))
            self._check(outcome, episode)
            episode.end(outcome)
        except TimeoutError:
            if not timer.expired():
                raise
            episode.finish = "seconds"
        finally:
            closing = session.close()
            if isawaitable(closing):
                await self._close(closing)

    async def _close(self, closing: Awaitable[None]) -> None:
        """Wait for a session to close, but not forever."""
        try:
            async with asyncio.timeout(failures.CLOSING_SECONDS) as timer:
                await closing
        except TimeoutError:
            if not timer.expired():
                raise
            failures.warn_unclosed(self.table.environment, 1)

    def _check(self, outcome: object, episode: DrivenEpisode) -> None:
        """Raise `ContractError` if a session returned anything else than an outcome with declared metrics."""
        environment = self.table.environment
        told = f"{describe(environment, self._example(episode))} returned"
        if not isinstance(outcome, Outcome):
            raise ContractError(f"{told} {outcome!r}, which is not an Outcome")
        for name in outcome.metrics:
            if name not in environment.metrics:
                raise ContractError(f"{told} a metric {name!r} that is not in its `metrics`: {environment.metrics}")

    def _example(self, episode: DrivenEpisode) -> Any:
        return self.table.prompts.examples[episode.prompt]

    def rollouts(self) -> Rollouts:
        """Return the batch of all episodes."""
        table, tokenizer = self.table, self.table.encoder.tokenizer
        if not table.sampled:
            raise self.failures.first or UsageError("no agent asked the policy for a turn")
        names = [name for name in table.sampled[0].extras if name.endswith("_NT")]
        rows = table.prompts.rows([each.prompt for each in self.episodes])
        for i, episode in enumerate(self.episodes):
            if episode.segments:
                rows.token_ids[i] = list(episode.segments[0].prompt)
                rows.texts[i] = tokenizer.decode(rows.token_ids[i])
        end = int(tokenizer.eos_token_id)
        states = [each.to_state(Session(), end, names, tokenizer) for each in self.episodes]
        for state, _ in states:
            if table.sampled[0].kept_sets and not state.kept_sets:
                state.kept_sets = [KeptSets.whole(len(state.tokens))]
        table.prompts, table.episodes = rows, [state for state, _ in states]
        rollouts = to_rollouts(table)
        rollouts.extras["segments_NT"] = _pad([segments for _, segments in states], rollouts)
        rollouts.extras["segments_N"] = torch.tensor([max(1, len(each.segments)) for each in self.episodes])
        rollouts.extras["turns_N"] = torch.tensor([max(state.turns) + 1 for state, _ in states])
        return replace(rollouts, group_N=torch.tensor([each.prompt for each in self.episodes]))


def _pad(rows: Sequence[array[int]], rollouts: Rollouts) -> Any:
    """Return the numbers of segments, of the shape of the batch."""
    padded_NT = torch.zeros(rollouts.tokens_NT.shape, dtype=torch.long)
    for i, row in enumerate(rows):
        padded_NT[i, : len(row)] = torch.tensor(row)
    return padded_NT


class _EpisodePolicy:
    """The policy of one episode (`contract.driving.Policy`)."""

    def __init__(self, player: _Player, episode: DrivenEpisode) -> None:
        self._player, self._episode = player, episode
        self.encoder, self.sampling = player.table.encoder, player.table.sampling

    async def ask(
        self, token_ids: Sequence[int], max_tokens: int = 0, stop: Sequence[str] = (), seed: int | None = None
    ) -> Reply:
        """Return the policy's turn after `token_ids`."""
        episode, table = self._episode, self._player.table
        ids, number = tuple(token_ids), episode.asks
        limit, was_limited = self._limit(ids, max_tokens), episode.finish is not None
        index = episode.prompt * table.sampling.n + episode.k
        episode.waiting += 1
        try:
            sampled = await self._player.queue.wait_for(Ask(index, ids, self._uid(number, seed), limit, tuple(stop)))
        finally:
            episode.waiting -= 1
        self._check_open()
        left = table.sampling.max_new_tokens - episode.length - episode.count_added(ids)
        if left < 1:
            raise self._over("length", "simultaneous turns have used all tokens")
        turn, reply = _read(sampled, min(limit, left), episode.recorded, table.encoder.tokenizer)
        episode.record(ids, turn)
        if was_limited:  # the agent continues within its limits, for example after a compaction
            episode.finish = None
        return reply

    def _check_open(self) -> None:
        if self._episode.is_over:
            raise EpisodeOver("turns", "the agent has ended, so its episode has no further turns")

    def _uid(self, number: int, seed: int | None) -> int:
        """Return the number that seeds a turn."""
        episode = self._episode
        uid = self._player.table.prompts.uids[episode.prompt]
        if number or episode.k:
            uid = turn_uid(uid, episode.k, number)
        return uid if seed is None else turn_uid(turn_uid(uid, episode.k, number), seed, 1)

    def _limit(self, ids: tuple[int, ...], max_tokens: int) -> int:
        """Return how many tokens the turn may have; raise if the episode is over."""
        episode, table = self._episode, self._player.table
        self._check_open()
        if not ids:
            raise UsageError("the prompt has no tokens; send at least one")
        left = table.sampling.max_new_tokens - episode.length - episode.count_added(ids)
        room = table.encoder.max_prompt_tokens + table.sampling.max_new_tokens - len(ids)
        window = room if table.encoder.positions is None else min(room, table.encoder.positions - len(ids))
        limit = min(left, window)
        if limit < 1:
            raise self._over(
                "length", f"no token is left after {len(ids)}; raise {run_option('sampling.max_new_tokens')}"
            )
        if episode.asks >= table.limits.turns:
            turns = run_option("episode.turns")
            raise self._over("turns", f"the episode has used all {table.limits.turns} turns; raise {turns}")
        if table.time_left() == 0.0:
            raise self._over("seconds", f"the time of the batch has run out; raise {run_option('episode.seconds')}")
        return min([limit, *(each for each in (table.limits.turn_tokens, max_tokens) if each)])

    def _over(self, finish: Any, reason: str) -> EpisodeOver:
        self._episode.finish = self._episode.finish or finish
        return EpisodeOver(finish, reason)


def _read(sampled: SampledRow, limit: int, number: int, tokenizer: Any) -> tuple[Turn, Reply]:
    """Return a row of what the engine sampled, as it is recorded and as the agent gets it; cut to `limit`."""
    rollouts, i = sampled.rollouts, sampled.row
    length = min(int(rollouts.lengths_N[i]), limit)
    tokens = rollouts.tokens_NT[i, :length].tolist()
    text, stopped = rollouts.texts[i], rollouts.finish[i] == "stop"
    if length < int(rollouts.lengths_N[i]):
        (text,), stopped = decode(tokenizer, [tokens]), False
    numbers = {name: values[i, :length].tolist() for name, values in rollouts.extras.items() if name.endswith("_NT")}
    kept = rollouts.kept_sets[i] if rollouts.kept_sets else None
    if kept is not None and not isinstance(kept, KeptSets):
        raise ContractError("the rollout engine returned rules as kept sets of a turn: give sets, or none")
    mask = rollouts.mask_NT[i, :length].tolist()
    turn = Turn(number, (), tokens, mask, numbers, kept.cut(length) if kept is not None else None, text)
    logprobs = tuple(numbers["sampler_logprobs_NT"])
    return turn, Reply(text, tuple(tokens), logprobs, "stop" if stopped else "length", number)
