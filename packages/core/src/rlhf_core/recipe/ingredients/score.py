"""The ingredient `score`: a reward for every completion, by any reward provider or by a reward model of an earlier step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import DataError
from rlhf_core.recipe.ingredients.settings import check_flags, flags, merge
from rlhf_core.recipe.process import rlhf_run
from rlhf_core.util.atomic_files import write_text

__all__ = ["Score", "score_metrics"]


@dataclass(frozen=True)
class Score(Ingredient):
    """Score completions. A reward model renders each with its own tokenizer and chat template."""

    settings: dict[str, Any] = field(default_factory=dict)
    """options of `rlhf-run score`, such as `{reward = {use = "length", target = 40}}`; the reward model's, where one is read"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"completions": "dataset", "reward": "model"}
    optional: ClassVar[frozenset[str]] = frozenset({"reward"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"scored": "dataset", "scores": "metrics"}

    def check(self) -> None:
        """Check that `rlhf-run score` has these options.

        Raises:
            UsageError: one is unknown, or a value does not fit.
        """
        given = {"reward": {"use": "model", "model": "FOLDER"}}  # of a step that reads a reward model
        reward = self.settings.get("reward", {})
        named = isinstance(reward, str) or "use" in reward
        check_flags("score", self.settings if named else merge(given, self.settings), "FILE")

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Score them.

        Raises:
            RunStopped: the reward failed; the exception has its exit code.
            DataError: the reward abstained from every completion.
        """
        wired: dict[str, Any] = {}
        if "reward" in context.inputs:
            wired = {"reward": {"use": "model", "model": str(context.inputs["reward"].path)}}
        scored = context.folder / "scored.jsonl"
        words = [*flags(merge(self.settings, wired)), "--output", str(scored)]
        rlhf_run(
            ["score", str(context.inputs["completions"].path), *words], context.registry, context.folder / "log.txt"
        )
        rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").split("\n") if line]
        path = context.folder / "scores.json"
        write_text(path, json.dumps(score_metrics(rows)) + "\n")
        return {"scored": Artifact("dataset", scored), "scores": Artifact("metrics", path)}


def score_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return mean and best reward per prompt with their standard errors over prompts, and how many rows had a reward.

    Raises:
        DataError: no row has a reward.
    """
    groups: dict[Any, list[float]] = {}
    for number, row in enumerate(rows):
        if row["reward"] is not None:
            groups.setdefault(row.get("uid", number), []).append(float(row["reward"]))
    if not groups:
        raise DataError("the reward abstained from every completion")
    means, bests = [sum(group) / len(group) for group in groups.values()], [max(group) for group in groups.values()]
    answered = sum(map(len, groups.values()))
    found = {
        "completions": float(len(rows)),
        "abstained": (len(rows) - answered) / len(rows),
        "prompts": float(len(groups)),
    }
    for name, values in (("reward", means), ("best_reward", bests)):
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        found |= {name: mean, f"{name}_se": sqrt(variance / len(values))}
    return found
