"""Objective `reward`: the suffix under which sampled answers have the lowest reward (Geisler et al. 2025, arXiv:2502.17254).

The gradient of the mean reward is that of Σ advantage × log-probability over answers sampled now (REINFORCE), with the mean
reward of the other answers as baseline. The goal's target, where it has one, joins the answers, so that a search begins
somewhere. A departure from the paper: log-probabilities are means over tokens, so that long answers do not outweigh others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.lane import Answers, Lane

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.optimizer import Suffix

__all__ = ["JudgedAnswer", "Rewards", "leave_one_out", "renew_answers"]


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer to an attacked prompt, as a judge reads it."""

    message: str
    """the user's message, with the suffix, or without it by `judge_suffix`"""
    prompt: str
    """the whole prompt as text, which has this message"""
    prompt_ids: tuple[int, ...]
    """its tokens"""
    text: str
    """the answer without special tokens"""
    ids: tuple[int, ...]
    """tokens of the answer, the end token included"""
    cut: bool
    """it had no end token within `sample_tokens`"""


Rewards = Callable[[Sequence[JudgedAnswer]], Sequence[float]]
"""Returns the reward of each answer; all have the same prompt."""


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Return each reward minus the mean of the others."""
    total, count = sum(rewards), len(rewards)
    return [reward - (total - reward) / (count - 1) for reward in rewards]


def renew_answers(lane: Lane, suffix: Suffix, rewards: Rewards, judge_suffix: bool = True) -> tuple[float, float]:
    """Sample answers under the current suffix into `lane.answers`; return their mean reward and the operations.

    Raises:
        UsageError: the rewards are not one finite number per answer.
    """
    prompt, options = lane.prompt, suffix.options
    ids_L = suffix.ids_L.tolist()
    sampled = _sample(lane, prompt.prompt_ids(ids_L), suffix)
    answers = [*sampled, *(torch.tensor(ids, device=suffix.ids_L.device) for ids in prompt.answers[:1])]
    found = [float(reward) for reward in rewards(_as_judged(answers, lane, ids_L, judge_suffix))]
    if len(found) != len(answers) or not all(map(math.isfinite, found)):
        raise UsageError(f"{prompt.goal.place}: the reward must be one finite number per answer, not {found[:8]}")
    weights = tuple(-each / len(found) for each in leave_one_out(found))
    lane.answers = Answers(tuple(answers), "cross_entropy", weights)
    costs, length = lane.victim.costs, len(prompt.prompt_ids(ids_L))
    rows, longest = len(sampled), max(map(len, sampled))  # rows that have ended are computed until all have
    flops = costs.forward(rows, length, 0, 1) + sum(costs.forward(rows, 1, length + t, 1) for t in range(longest - 1))
    return sum(found[: options.reward_samples]) / options.reward_samples, flops


def _as_judged(answers: Sequence[Tensor], lane: Lane, ids_L: Sequence[int], judge_suffix: bool) -> list[JudgedAnswer]:
    """Return answers to the suffix as the judge reads them. The target ends where its text does."""
    prompt = lane.prompt
    if judge_suffix:
        suffix = prompt.texts([ids_L])[0]
        message, shown, shown_ids = prompt.message(suffix), prompt.render(suffix), prompt.prompt_ids(ids_L)
    else:
        message, (shown, ids) = prompt.question, prompt.render_question()
        shown_ids = tuple(ids)
    found = []
    for k, answer in enumerate(answers):
        ids = answer.tolist()
        text = str(prompt.tokenizer.decode(ids, skip_special_tokens=True))
        cut = k < prompt.options.reward_samples and ids[-1] not in _ends(lane)
        found.append(JudgedAnswer(message, shown, shown_ids, text, tuple(ids), cut))
    return found


def _ends(lane: Lane) -> list[int]:
    """Return the tokens that end an answer."""
    own = lane.victim.model.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else lane.prompt.tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def _sample(lane: Lane, prompt_ids: Sequence[int], suffix: Suffix) -> list[Tensor]:
    """Return sampled answers, at temperature 1 from the whole distribution, each with its end token."""
    from transformers import GenerationConfig

    victim, options, ends = lane.victim, suffix.options, _ends(lane)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=options.sample_tokens,
        num_return_sequences=options.reward_samples, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    seed = int(torch.randint(2**31, (1,), generator=suffix.generator))
    devices = [victim.device] if victim.device.type == "cuda" else []
    rows = torch.tensor([list(prompt_ids)], device=victim.device)
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = victim.model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=config)
    answers = []
    for ids in output[:, rows.shape[1] :].tolist():
        end = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        answers.append(torch.tensor(ids[:end], device=victim.device))
    return answers
