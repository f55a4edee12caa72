"""Questions to sample: goals without a suffix, and with the suffix of an attack, as the tokens that it optimized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_eval_gcg.attack import AttackPrompt
from rlhf_eval_gcg.evaluation.answers import CLEAN, Question
from rlhf_eval_gcg.evaluation.store import goal_key

if TYPE_CHECKING:
    from rlhf_core import Message
    from rlhf_eval_gcg.attack import Attack, AttackResult, Goal

__all__ = ["attacked_question", "clean_question", "prompt_of"]


def attacked_question(number: int, seed: int, result: AttackResult, tokenizer: Any, options: Attack) -> Question:
    """Return the question that an attack made of a goal."""
    prompt = AttackPrompt.build(result.goal, tokenizer, options)
    text = prompt.render(result.text)
    return Question(number, _uid(result.goal), seed, text, result.prompt_ids, prompt_of(result.message, options))


def clean_question(number: int, goal: Goal, tokenizer: Any, options: Attack) -> Question:
    """Return the question of a goal without a suffix."""
    prompt = AttackPrompt.build(goal, tokenizer, options)
    text, ids = prompt.render_question()
    return Question(number, _uid(goal), CLEAN, text, tuple(ids), prompt_of(prompt.question, options))


def prompt_of(message: str, options: Attack) -> str | tuple[Message, ...]:
    """Return the prompt of a user's message as data would have it: a chat, or plain text."""
    if not options.chat:
        return (f"{options.system}\n\n" if options.system else "") + message + "\n"
    system = [{"role": "system", "content": options.system}] if options.system else []
    return (*system, {"role": "user", "content": message})


def _uid(goal: Goal) -> int:
    """Return the number that seeds a goal's answers, of 63 bits."""
    return int(goal_key(goal), 16) >> 1
