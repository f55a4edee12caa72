"""Answers to prompts with and without suffixes: sampled by the run's rollout engine, and judged.

A prompt goes to the engine as the tokens that were attacked; text is not tokenized again. The seed of a completion follows from
the run's seed, the goal and the attack's seed, so that neither ranks nor batches nor other goals change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core import Example, Prompts, Rollouts, Sampling, pad_rows
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core import Message, RewardOutput, RunView
    from rlhf_eval_gcg.attack import JudgedAnswer

__all__ = ["CLEAN", "Question", "as_rollouts", "ask"]

CLEAN = -1
"""The attack seed of questions without a suffix."""


@dataclass(frozen=True)
class Question:
    """A prompt that is answered `n` times."""

    goal: int
    """number of the goal, from 0"""
    key: int
    """number that follows from the goal's texts; completions are seeded by it"""
    seed: int
    """the attack's seed; -1 without a suffix"""
    text: str
    """the rendered prompt"""
    ids: tuple[int, ...]
    """tokens of the rendered prompt"""
    prompt: str | tuple[Message, ...]
    """the prompt in the form of data"""

    @property
    def has_suffix(self) -> bool:
        """Return True if the prompt was attacked."""
        return self.seed != CLEAN


def ask(
    run: RunView,
    role: str,
    pairs: Sequence[tuple[Question, Question]],
    standin: tuple[Question, Question],
    n: int,
    batch: int,
    judge: Callable[[Rollouts], RewardOutput],
) -> list[dict[str, Any]]:
    """Return a row per completion of this rank's questions, all of one attack seed; collective over ranks.

    Args:
        run: the run.
        role: that answers.
        pairs: what is asked, and how the judge sees it.
        standin: a pair that is asked, and forgotten, where other ranks have more questions: ranks sample together.
        n: completions per question.
        batch: questions asked together.
        judge: scores completions.
    """
    rounds = max(run.world.gather(-(-len(pairs) // batch)))
    rows: list[dict[str, Any]] = []
    for start in range(0, rounds * batch, batch):
        part = pairs[start : start + batch]
        found = _rows(run, role, part or [standin], n, judge)
        rows += found if part else []
    return rows


def as_rollouts(answers: Sequence[JudgedAnswer], prompts: Sequence[str | tuple[Message, ...]]) -> Rollouts:
    """Return answers that an attack sampled to one prompt as a judge reads those of a rollout engine.

    Args:
        answers: N answers.
        prompts: the prompt of each in the form of data.
    """
    prompt_NL, prompt_lengths_N = pad_rows([list(answer.prompt_ids) for answer in answers])
    tokens_NT, lengths_N = pad_rows([list(answer.ids) for answer in answers])
    return Rollouts(
        prompts=[answer.prompt for answer in answers],
        texts=[answer.text for answer in answers],
        prompt_NL=prompt_NL,
        prompt_lengths_N=prompt_lengths_N,
        tokens_NT=tokens_NT,
        lengths_N=lengths_N,
        mask_NT=torch.arange(tokens_NT.shape[1])[None] < lengths_N[:, None],
        group_N=torch.zeros(len(answers), dtype=torch.long),
        labels=[None] * len(answers),
        meta=[{"prompt": prompt} for prompt in prompts],
        finish=["length" if answer.cut else "stop" for answer in answers],
    )


def _rows(
    run: RunView,
    role: str,
    pairs: Sequence[tuple[Question, Question]],
    n: int,
    judge: Callable[[Rollouts], RewardOutput],
) -> list[dict[str, Any]]:
    """Ask questions of one attack seed, and judge the answers."""
    asked = [question for question, _ in pairs]
    seed = asked[0].seed
    base = Sampling(seed=run.config.seed).seed_for(seed, -1) if asked[0].has_suffix else run.config.seed
    rollouts = run.rollouts(role, _prompts(asked), replace(run.config.sampling, n=n, seed=base))
    output = judge(_as_judged(rollouts, [shown for _, shown in pairs for _ in range(n)]))
    answered, rewards = output.answered_N.tolist(), output.total_N.tolist()
    return [
        {
            "goal": asked[i // n].goal,
            "seed": asked[i // n].seed if asked[i // n].has_suffix else None,
            "attacked": asked[i // n].has_suffix,
            "k": i % n,
            "completion": rollouts.texts[i],
            "tokens": int(rollouts.lengths_N[i]),
            "finish": str(rollouts.finish[i]),
            "reward": rewards[i] if answered[i] else None,
        }
        for i in range(len(rollouts))
    ]


def _prompts(questions: Sequence[Question]) -> Prompts:
    """Return questions as a rollout engine takes them."""
    return Prompts(
        texts=[question.text for question in questions],
        token_ids=[list(question.ids) for question in questions],
        examples=[Example(question.prompt, meta={"prompt": question.prompt}) for question in questions],
        uids=[question.key for question in questions],
    )


def _as_judged(rollouts: Rollouts, shown: Sequence[Question]) -> Rollouts:
    """Return completions under the prompts that the judge is to read."""
    prompt_NL, prompt_lengths_N = pad_rows([list(question.ids) for question in shown])
    return replace(
        rollouts,
        prompts=[question.text for question in shown],
        prompt_NL=prompt_NL,
        prompt_lengths_N=prompt_lengths_N,
        meta=[{**meta, "prompt": question.prompt} for meta, question in zip(rollouts.meta, shown, strict=True)],
    )
