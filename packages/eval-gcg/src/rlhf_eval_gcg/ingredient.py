"""The ingredient `gcg`: attacks on a model, as `rlhf-run eval --evaluator gcg` makes them, and the attacked prompts as data.

Training on the attacked prompts of all iterations so far, and attacking what was trained, is a group of a recipe:

    recipe = ["attack", { repeat = 3, steps = ["train", "attack"] }]

with `writes = { prompts = "prompts" }` for the attack and `data = "prompts@all"` for the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlhf_core import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.contract.ranges import at_least
from rlhf_core.recipe.ingredients.evaluate import Evaluate
from rlhf_core.recipe.ingredients.settings import merge
from rlhf_core.util.atomic_files import write_text

__all__ = ["Attack"]


@dataclass(frozen=True)
class Attack(Ingredient):
    """Attack a model with GCG, measure its answers, and write the attacked prompts as rows to train on."""

    settings: dict[str, Any] = field(default_factory=dict)
    """options of `rlhf-run eval`: `reward`, `sampling`, and of the attack, such as `{evaluator = {goals = "goals.csv"}}`"""
    copies: int = 1
    """times that each attacked prompt is written"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"model": "model", "reward": "model"}
    optional: ClassVar[frozenset[str]] = frozenset({"reward"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"metrics": "metrics", "prompts": "dataset"}

    def __post_init__(self) -> None:
        at_least(1, self, "copies")

    def check(self) -> None:
        """Check that there are such options, goals and judges.

        Raises:
            UsageError: one is unknown, or the goals cannot be read.
        """
        self._evaluate().check()

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Attack it. Attacks that were finished before a stop are not made again.

        Raises:
            RunStopped: the evaluation failed; the exception has its exit code.
        """
        found, prompts = context.folder / "attacks.jsonl", context.folder / "prompts.jsonl"
        metrics = self._evaluate(export=str(found))(context)["metrics"]
        write_text(prompts, found.read_text(encoding="utf-8") * self.copies)
        return {"metrics": metrics, "prompts": Artifact("dataset", prompts)}

    def _evaluate(self, **evaluator: Any) -> Evaluate:
        """Return the ingredient that evaluates with the attack."""
        return Evaluate(merge(self.settings, {"evaluator": {"use": "gcg", **evaluator}}))
