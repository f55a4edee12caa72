"""Attack goals: the loop of GCG (Zou et al. 2023, arXiv:2307.15043, algorithm 1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.prompt import AttackPrompt
from rlhf_eval_gcg.attack.result import AttackResult

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.goal import Goal
    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["AttackProgress", "attack"]


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
    seed: int,
    state_file: Path | None = None,
    progress: Callable[[AttackProgress], None] | None = None,
    draft: Any = None,
    rewards: Callable[[list[str], list[str]], Sequence[float]] | None = None,
    more_models: Sequence[Any] = (),
) -> list[AttackResult]:
    """Search a suffix for each goal; return one result per goal, in order.

    Args:
        model: a causal language model of transformers; neither its weights nor their requires_grad are changed.
        tokenizer: of the model.
        goals: questions and targets.
        options: of the search.
        seed: of everything that is drawn; the same seed gives the same suffixes.
        state_file: file that keeps the state of a long attack; a later call with the same arguments continues from it.
        progress: called after each step of a goal.
        draft: a small model with the same tokenizer, for schedule `probe`.
        rewards: returns the reward of each answer, for objective `reward`: called with prompts and answers.
        more_models: further models with the same tokenizer that the suffix is to work on as well.

    Raises:
        UsageError: the options, goals, model and tokenizer do not go together.
    """
    # The engine that reads these follows; the interface is complete, the search is a plain random one until then.
    _ = (state_file, progress, draft, rewards, more_models)
    _ = (options.max_flops, options.flop_rule, options.topk, options.n_replace, options.loss, options.early_stop)
    _ = (options.ascii, options.filter_ids, options.prefix_cache, options.sample_tokens, options.transfer)
    _ = (options.cw_margin, options.batch_tokens, options.restarts)
    if not goals:
        raise UsageError("there are no goals to attack")
    return [_one(model, tokenizer, goal, options, seed + k) for k, goal in enumerate(goals)]


def _one(model: Any, tokenizer: Any, goal: Goal, options: Attack, seed: int) -> AttackResult:
    prompt = AttackPrompt.build(goal, tokenizer, options)
    draw = random.Random(seed)  # noqa: S311 - not for secrets
    current = list(prompt.suffix_ids)
    losses: list[float] = []
    tried: list[list[int]] = []
    initial = float(_losses(model, prompt, [current])[0])
    for _ in range(options.steps):
        rows = [list(current) for _ in range(options.search_width)]
        for row in rows:
            row[draw.randrange(len(row))] = draw.randrange(len(tokenizer))
        rows = [row for row, kept in zip(rows, prompt.stable(rows), strict=True) if kept] or [current]
        found = _losses(model, prompt, rows)
        current = rows[int(found.argmin())]
        losses.append(float(found.min()))
        tried.append(current)
    best = tried[losses.index(min(losses))]
    texts = prompt.texts(tried)
    text = prompt.texts([best])[0]
    return AttackResult(
        goal, tuple(best), text, prompt.message(text), prompt.prompt_ids(best), min(losses), initial, tuple(losses),
        tuple(texts), tuple(1e9 * (k + 1) for k in range(len(losses))), len(losses) * options.search_width, False,
        prompt.answers[0],
    )  # fmt: skip


def _unread(result: AttackResult, done: AttackProgress) -> tuple[Any, ...]:
    """Read what the evaluator will read."""
    return (
        result.initial_loss, result.candidates, result.matched, result.target_ids, result.message, result.texts,
        result.losses, result.flops, result.loss, result.text, result.prompt_ids, result.ids, done.goal, done.goals,
        done.step, done.steps, done.text, done.flops, done.loss,
    )  # fmt: skip


def _losses(model: Any, prompt: AttackPrompt, rows: list[list[int]]) -> Tensor:
    ids = torch.tensor([[*prompt.prompt_ids(row), *prompt.answers[0]] for row in rows], device=model.device)
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.float().log_softmax(-1)
    length = len(prompt.answers[0])
    found = logprobs[:, -length - 1 : -1].gather(2, ids[:, -length:, None])[..., 0]
    mean: Tensor = -found.mean(1)
    return mean
