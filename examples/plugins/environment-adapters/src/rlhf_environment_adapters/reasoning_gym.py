"""`--environment reasoning_gym --environment.task basic_arithmetic`: a task of reasoning-gym, with tries and its verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_core import Environment, EpisodeOver, Example, Feedback, Outcome, Policy, Session
from rlhf_environment_adapters.dialogue import Dialogue, require

__all__ = ["ReasoningGym"]

PACKAGE = "rlhf-environment-adapters[reasoning]"


@dataclass(frozen=True)
class ReasoningGym(Environment):
    """A task of reasoning-gym: the policy answers, and tries again where the verifier says no."""

    task: str = "basic_arithmetic"
    """name of the data set"""
    tries: int = 3
    """number of answers that the policy may give"""
    retry: str = "That is not right. Try again."
    """text that the policy reads after a wrong answer"""
    discount: float = 0.5
    """factor on the reward for each further try, 0 to 1"""

    drives = True
    metrics = ("tries",)

    def check(self) -> None:
        """Find the package and the task."""
        self.tasks(0)

    def tasks(self, seed: int) -> Any:
        """Return a data set with one task, made from a seed."""
        return require("reasoning_gym", PACKAGE).create_dataset(self.task, size=1, seed=seed)

    def __call__(self, example: Example, seed: int) -> Session:
        return TaskSession(self, example, seed)


@dataclass
class TaskSession(Session):
    """One task."""

    environment: ReasoningGym
    example: Example
    seed: int

    async def drive(self, policy: Policy) -> Outcome:
        """Ask, verify, and ask again. The best answer counts."""
        options = self.environment
        tasks = options.tasks(self.seed % 2**31)
        entry = tasks[0]
        question = Example(({"role": "user", "content": entry["question"]},), origin=self.example.origin)
        dialogue, best, tries = Dialogue(policy, question), (0.0, 0.0), 0
        try:
            for tries in range(1, options.tries + 1):
                reply = await dialogue.turn()
                score = float(tasks.score_answer(reply.text.strip(), entry))
                best = max(best, (score * options.discount ** (tries - 1), score))
                if score == 1.0 or tries == options.tries:
                    break
                dialogue.tell(Feedback(messages=({"role": "user", "content": options.retry},)))
        except EpisodeOver:
            pass
        return Outcome(best[0], score=best[1], metrics={"tries": float(tries)})
