"""The ingredient `score`: a reward for every completion, by any reward provider or by a reward model of an earlier step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import DataError, OptionError
from rlhf_core.recipe.ingredients.settings import check_flags, flags, merge, names_provider
from rlhf_core.recipe.process import rlhf_run
from rlhf_core.util.atomic_files import write_text

__all__ = ["Score", "score_metrics"]


@dataclass(frozen=True)
class Score(Ingredient):
    """Score completions. A reward model renders each with its own tokenizer and chat template.

    Lines have `reward`, and `uncertainty` where the reward reports one, as `uncertain` of rlhf-algos does. The completions of
    a prompt are scored together.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    """options of `rlhf-run score`, such as `{reward = {use = "length", target = 40}}`; the reward model's, where one is read"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"completions": "dataset", "reward": "model", "state": "state"}
    optional: ClassVar[frozenset[str]] = frozenset({"reward", "state"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"scored": "dataset", "scores": "metrics"}

    def check(self) -> None:
        """Check that `rlhf-run score` has these options.

        Raises:
            UsageError: one is unknown, or a value does not fit.
        """
        given = {"reward": {"use": "model", "model": "FOLDER"}}  # of a step that reads a reward model
        check_flags(
            "score", self.settings if names_provider(self.settings, "reward") else merge(given, self.settings), "FILE"
        )

    def check_inputs(self, given: Set[str]) -> None:
        """Check that there is a reward.

        Raises:
            OptionError: neither the settings name one, nor does the step read a reward model.
        """
        if not names_provider(self.settings, "reward") and "reward" not in given:
            raise OptionError("settings", 'needs reward = {use = "NAME"}, or the step reads.reward = ARTIFACT')

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Score them.

        Raises:
            RunStopped: the reward failed; the exception has its exit code.
            DataError: the reward abstained from every completion.
        """
        scored = self.score(context, context.inputs["completions"].path)
        rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").split("\n") if line]
        path = context.folder / "scores.json"
        write_text(path, json.dumps(score_metrics(rows)) + "\n")
        return {"scored": Artifact("dataset", scored), "scores": Artifact("metrics", path)}

    def score(self, context: IngredientContext, completions: Path) -> Path:
        """Score the lines of a file, and return the file with their rewards; after a stop, continue with what has none.

        Raises:
            RunStopped: the reward failed; the exception has its exit code.
        """
        wired: dict[str, Any] = {}
        if "reward" in context.inputs:
            use = {} if names_provider(self.settings, "reward") else {"use": "model"}
            wired["reward"] = {**use, "model": str(context.inputs["reward"].path)}
        if "state" in context.inputs:
            wired.setdefault("reward", {})["state"] = str(context.inputs["state"].path)
        if "batch_size" not in self.settings:
            wired["batch_size"] = _whole_prompts(completions)
        scored = context.folder / "scored.jsonl"
        words = ["score", str(completions), *flags(merge(self.settings, wired)), "--output", str(scored)]
        rlhf_run(words, context.registry, context.folder / "log.txt")
        return scored


def _whole_prompts(path: Path) -> int:
    """Return a batch size near 64 that cuts no prompt's completions apart, if every prompt has as many."""
    counts = Counter(json.loads(line).get("uid") for line in path.read_text(encoding="utf-8").split("\n") if line)
    n = max(counts.values(), default=1)
    return max(1, 64 // n) * n


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
