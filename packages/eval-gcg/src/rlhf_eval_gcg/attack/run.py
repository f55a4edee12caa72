"""Attack goals: build the searches, step them in waves that fill a batch, keep their state, and return results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.lazy import torch
from rlhf_core.util.messages import log
from rlhf_eval_gcg.attack.engine import Engine
from rlhf_eval_gcg.attack.lane import Lane
from rlhf_eval_gcg.attack.prompt import AttackPrompt
from rlhf_eval_gcg.attack.result import AttackResult
from rlhf_eval_gcg.attack.scoring import Scorer
from rlhf_eval_gcg.attack.search import Search, make_search
from rlhf_eval_gcg.attack.state import StateFile, fingerprint
from rlhf_eval_gcg.attack.tokens import allowed_tokens, letter_tokens
from rlhf_eval_gcg.attack.victim import Victim

if TYPE_CHECKING:
    from rlhf_eval_gcg.attack.goal import Goal
    from rlhf_eval_gcg.attack.options import Attack
    from rlhf_eval_gcg.attack.reward_objective import Rewards

__all__ = ["AttackProgress", "attack"]

TOLERANCE, ROUGH_TOLERANCE = 1e-3, 0.2
"""Nats that sharing beginnings may change the loss by: rounding of float32, and of smaller types."""
SEED_STRIDE = 1_000_003
"""Distance of the seeds of two attacks, a prime."""
SEEDS = 2**63
"""Number of seeds that a torch generator distinguishes."""


@dataclass(frozen=True)
class AttackProgress:
    """The state of an attack after a step of one goal."""

    goal: int
    """number of the goal, from 0"""
    goals: int
    """number of goals"""
    step: int
    """steps done for this goal"""
    steps: int
    """steps asked for"""
    loss: float
    """lowest loss so far, nats"""
    flops: float
    """floating-point operations for this goal so far"""
    text: str
    """the best suffix so far"""


def attack(
    model: Any,
    tokenizer: Any,
    goals: Sequence[Goal],
    options: Attack,
    *,
    seed: int | Sequence[int],
    state_file: Path | None = None,
    progress: Callable[[AttackProgress], None] | None = None,
    draft: Any = None,
    rewards: Rewards | None = None,
    judge_suffix: bool = True,
    more_models: Sequence[Any] = (),
) -> list[AttackResult]:
    """Search a suffix for each goal; return one result per goal, in order.

    Args:
        model: a causal language model of transformers; neither its weights nor their requires_grad are changed.
        tokenizer: of the model.
        goals: questions and targets.
        options: of the search.
        seed: of everything that is drawn; the same seed gives the same suffixes. Of one seed per goal, each gives the suffix of
            attacking that goal alone.
        state_file: file that keeps the state of a long attack; a later call with the same arguments continues from it.
        progress: called after each step of a goal.
        draft: a small model with the same tokenizer, for schedule `probe`.
        rewards: returns the reward of each answer, for objective `reward`; see `JudgedAnswer`.
        judge_suffix: show `rewards` prompts with the suffix; False shows them without.
        more_models: further models with the same tokenizer that the suffix is to work on as well.

    Raises:
        UsageError: the options, goals, model and tokenizer do not go together.
    """
    _check(goals, options, rewards, seed)
    victims = [Victim(each, options.prefix_cache, options.flop_rule) for each in (model, *more_models)]
    drafted = None if draft is None else Victim(draft, options.prefix_cache, options.flop_rule)
    every = [*victims, *([drafted] if drafted else [])]
    prompts = [AttackPrompt.build(goal, tokenizer, options) for goal in goals]
    with ExitStack() as stack:
        for victim in every:
            stack.enter_context(victim.freeze())
        searches = _searches(prompts, victims, drafted, tokenizer, options, seed)
        engine = Engine(Scorer(options), rewards if options.objective == "reward" else None, judge_suffix)
        _check_sharing(engine, searches)
        keeper = None
        if state_file is not None:
            keeper = StateFile(Path(state_file), fingerprint([v.model for v in every], goals, options, seed))
            keeper.load(searches)
        for wave in _waves(searches, options):
            _run(engine, wave, searches, keeper, progress, len(goals))
        return _results(searches, goals, len(victims))


def _check(goals: Sequence[Goal], options: Attack, rewards: Rewards | None, seed: int | Sequence[int]) -> None:
    """Raise `UsageError` for what cannot work."""
    if not goals:
        raise UsageError("there are no goals to attack; give at least one")
    if not isinstance(seed, int) and (options.transfer or len(seed) != len(goals)):
        raise UsageError(
            f"there are {len(seed)} seeds for {len(goals)} goals; give one seed, or (without transfer) one per goal"
        )
    if options.objective == "reward" and rewards is None:
        raise OptionError("objective", "reward needs a judge that scores answers; choose one, or use objective target")
    if options.objective == "bad_set" and not any(goal.bad_set for goal in goals):
        raise OptionError(
            "objective", "bad_set needs goals with a list bad_set of further answers, as rows of a JSON file have"
        )


def _searches(
    prompts: Sequence[AttackPrompt],
    victims: Sequence[Victim],
    draft: Victim | None,
    tokenizer: Any,
    options: Attack,
    seed: int | Sequence[int],
) -> list[Search]:
    """Return the searches: one per goal and restart, or per restart where one suffix is for all goals."""
    width = min(victim.vocabulary for victim in (*victims, *([draft] if draft else [])))
    if width < len(tokenizer) // 2:
        raise UsageError(
            f"a model has {width} tokens, but the tokenizer has {len(tokenizer)}; use models that share one tokenizer"
        )
    allowed_V = allowed_tokens(tokenizer, width, options.ascii)
    tokens = (allowed_V, letter_tokens(tokenizer, allowed_V))
    parts = [list(range(len(prompts)))] if options.transfer else [[number] for number in range(len(prompts))]
    if isinstance(seed, int):
        draws = [(seed, number * options.restarts) for number in range(len(parts))]
    else:
        draws = [(own, 0) for own in seed]
    return [
        make_search(
            part, [prompts[k] for k in part], victims, draft, tokens, options,
            (begin * SEED_STRIDE + offset + restart) % SEEDS, restart,
        )
        for part, (begin, offset) in zip(parts, draws, strict=True)
        for restart in range(options.restarts)
    ]  # fmt: skip


def _check_sharing(engine: Engine, searches: Sequence[Search]) -> None:
    """Compare the loss of the first suffix with and without shared beginnings, once per model; share none where they differ."""
    lanes = [lane for search in searches for lane in (*search.lanes, *search.draft_lanes)]
    for victim in dict.fromkeys(lane.victim for lane in lanes if lane.cached and lane.answers.ids):
        own = [each for each in lanes if each.victim is victim and each.cached and each.answers.ids]
        lane = max(own, key=lambda each: len(each.before_P))
        victim.packs = victim.packs and len(lane.before_P) > 0  # else nothing is compared
        reason = _sharing_fault(engine, lane)
        if reason and victim.packs:  # an architecture whose attention is its own
            victim.packs = False
            reason = _sharing_fault(engine, lane)
        if reason:
            log.warning("the attack runs without a prefix cache, which takes more time: %s", reason)
            for each in lanes:
                each.cached = each.cached and each.victim is not victim


def _sharing_fault(engine: Engine, lane: Lane) -> str:
    """Return why a model cannot share beginnings, empty if it can."""
    victim = lane.victim
    ids_2L = torch.tensor([lane.prompt.suffix_ids] * 2, device=victim.device)  # rows of one pass must not mix
    try:
        lane.open()
        (together,), _, _ = engine.scorer.losses([(lane, ids_2L)])
    except UsageError:
        raise
    except Exception as error:  # an architecture whose cache is its own
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    apart_lane = replace(lane, cached=False)
    (apart,), _, _ = engine.scorer.losses([(apart_lane, ids_2L[:1])])
    difference = float((together - apart).abs().max())
    precise = victim.embedding.weight.dtype in (torch.float32, torch.float64)
    return (
        "" if difference <= (TOLERANCE if precise else ROUGH_TOLERANCE) else f"they change the loss by {difference:.2g}"
    )


def _waves(searches: Sequence[Search], options: Attack) -> list[list[Search]]:
    """Cut searches into waves that are stepped together: as many as fill a batch, one by one on a CPU."""
    first = searches[0].lanes[0]
    tail = len(first.prompt.suffix_ids) + len(first.after_A) + max((len(ids) for ids in first.answers.ids), default=1)
    rows = options.search_width * len(searches[0].lanes)
    fit = 1 if first.victim.on_cpu else max(1, options.batch_tokens // (rows * tail))
    size = options.goals_at_once or fit
    return [list(searches[start : start + size]) for start in range(0, len(searches), size)]


def _run(
    engine: Engine,
    wave: Sequence[Search],
    searches: Sequence[Search],
    keeper: StateFile | None,
    progress: Callable[[AttackProgress], None] | None,
    goals: int,
) -> None:
    """Step the searches of a wave to their ends."""
    for search in wave:
        if not search.is_finished:
            engine.begin(search)
    while active := [search for search in wave if not search.is_finished]:
        engine.step(active)
        if keeper is not None:
            keeper.save(searches)
        if progress is not None:
            for search in active:
                _report(search, progress, goals)
    if keeper is not None:
        keeper.save(searches, force=True)


def _report(search: Search, progress: Callable[[AttackProgress], None], goals: int) -> None:
    """Call `progress` for each goal of a search."""
    record = search.record
    text = search.lanes[0].prompt.texts([record.ids[record.best]])[0]
    for goal in search.goals:
        loss, steps = record.losses[record.best], search.suffix.options.steps
        progress(AttackProgress(goal, goals, len(record.losses), steps, loss, record.spent, text))


def _results(searches: Sequence[Search], goals: Sequence[Goal], models: int) -> list[AttackResult]:
    """Return the result of each goal: of the best of its searches."""
    results = []
    for number, goal in enumerate(goals):
        own = [search for search in searches if number in search.goals]
        best = min(own, key=lambda search: (not search.record.matched, search.record.losses[search.record.best]))
        lane = best.lanes[best.goals.index(number) * models]
        flops = [sum(each.record.flops[: step + 1][-1] for each in own) for step in range(len(best.record.flops))]
        candidates = sum(each.record.candidates for each in own)
        result = replace(best.result(lane, goal), flops=tuple(flops), candidates=candidates)
        if best.suffix.options.filter_ids and not lane.prompt.stands(result.text, result.prompt_ids):
            log.warning(
                "%s: the tokens of the suffix %r change when the chat is tokenized again; report this tokenizer, "
                "or set %s",
                goal.place, result.text, option("chat", "False"),
            )  # fmt: skip
        results.append(result)
    return results
