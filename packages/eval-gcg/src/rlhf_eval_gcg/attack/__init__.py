"""The GCG attack: finds a suffix that makes a model produce a target (Zou et al. 2023, arXiv:2307.15043, algorithm 1).

    from rlhf_eval_gcg.attack import Attack, Goal, attack
    results = attack(model, tokenizer, [Goal("Say hello.", "Hello, friend")], Attack(steps=50), seed=0)

These names are public; `Losses` to `TokenGradient` are what a suffix optimizer is written with. They are imported when they are
used, so that importing this package brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_eval_gcg.attack.goal import Goal
    from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, SuffixOptimizer, TokenGradient
    from rlhf_eval_gcg.attack.options import Attack
    from rlhf_eval_gcg.attack.prompt import AttackPrompt
    from rlhf_eval_gcg.attack.result import AttackResult
    from rlhf_eval_gcg.attack.reward_objective import JudgedAnswer
    from rlhf_eval_gcg.attack.run import attack

__all__ = [
    "Attack",
    "AttackPrompt",
    "AttackResult",
    "Goal",
    "JudgedAnswer",
    "Losses",
    "Move",
    "Suffix",
    "SuffixOptimizer",
    "TokenGradient",
    "attack",
]

_HOMES = {
    "goal": "Goal",
    "optimizer": "Losses Move Suffix SuffixOptimizer TokenGradient",
    "options": "Attack",
    "prompt": "AttackPrompt",
    "result": "AttackResult",
    "reward_objective": "JudgedAnswer",
    "run": "attack",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"rlhf_eval_gcg.attack.{module}"), name)
    raise AttributeError(f"module 'rlhf_eval_gcg.attack' has no attribute {name!r}")
