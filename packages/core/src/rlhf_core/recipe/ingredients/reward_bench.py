"""The ingredient `reward_bench`: how often a reward ranks a good completion above all bad ones of its prompt.

RewardBench 2 (arXiv 2506.01937) asks in this form, with one good completion of four. A row has `prompt` (text or messages),
`chosen` (a text or a list of texts), `rejected` (a list), and perhaps `subset` or `datasource`, by which accuracy is split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import DataError
from rlhf_core.recipe.ingredients.score import Score
from rlhf_core.util.atomic_files import write_text

__all__ = ["RewardBench", "rank_metrics"]

SUBSETS = ("subset", "datasource")
"""Columns that name the part of the benchmark which a row belongs to, first hit first."""


@dataclass(frozen=True)
class RewardBench(Ingredient):
    """Measure a reward on prompts with good and bad completions: the share of prompts whose best one is good."""

    settings: dict[str, Any] = field(default_factory=dict)
    """options of `rlhf-run score`; the reward model's, where one is read"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"rows": "dataset", "reward": "model", "state": "state"}
    optional: ClassVar[frozenset[str]] = frozenset({"reward", "state"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"metrics": "metrics", "scored": "dataset"}

    def check(self) -> None:
        """Check that `rlhf-run score` has these options.

        Raises:
            UsageError: one is unknown, or a value does not fit.
        """
        Score(self.settings).check()

    def check_inputs(self, given: Set[str]) -> None:
        """Check that there is a reward.

        Raises:
            OptionError: neither the settings name one, nor does the step read a reward model.
        """
        Score(self.settings).check_inputs(given)

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Score all completions and compare them.

        Raises:
            DataError: a row lacks good or bad completions, or the reward abstained from every prompt.
            RunStopped: the reward failed; the exception has its exit code.
        """
        completions, path = context.folder / "completions.jsonl", context.folder / "metrics.json"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _completions(context.inputs["rows"].path)]
        write_text(completions, "".join(lines))
        scored = Score(self.settings).score(context, completions)
        rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").split("\n") if line]
        write_text(path, json.dumps(rank_metrics(rows)) + "\n")
        return {"metrics": Artifact("metrics", path), "scored": Artifact("dataset", scored)}


def rank_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return accuracy with its standard error over prompts, accuracy by subset, and the mean margin of rewards.

    Where several completions share the highest reward, the prompt counts with the share of them that is good, so that a
    constant reward has the accuracy of chance. Prompts with a completion without a reward are left out and counted.

    Args:
        rows: lines with uid, good, reward, and perhaps subset.

    Raises:
        DataError: no prompt is left.
    """
    prompts: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(row["uid"], []).append(row)
    right: dict[str, list[float]] = {}
    margins = []
    for group in prompts.values():
        if any(row["reward"] is None for row in group):
            continue
        best = [row["good"] for row in group if row["reward"] == max(each["reward"] for each in group)]
        right.setdefault(str(group[0].get("subset", "")), []).append(sum(best) / len(best))
        good, bad = ([row["reward"] for row in group if row["good"] is side] for side in (True, False))
        margins.append(max(good) - max(bad))
    values = [value for part in right.values() for value in part]
    if not values:
        raise DataError("the reward abstained from a completion of every prompt")
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return {
        "accuracy": mean,
        "accuracy_se": sqrt(variance / len(values)),
        "margin": sum(margins) / len(margins),
        "prompts": float(len(values)),
        "left_out": float(len(prompts) - len(values)),
        **{f"accuracy/{name}": sum(part) / len(part) for name, part in sorted(right.items()) if name},
    }


def _completions(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a line per completion, good ones first.

    Raises:
        DataError: a row has no prompt, no good or no bad completion.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
            good, bad = ([side] if isinstance(side, str) else list(map(str, side)) for side in (chosen, rejected))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: expected prompt, chosen and rejected ({error!r})") from None
        if not good or not bad:
            raise DataError(f"{path}:{number}: expected at least one chosen and one rejected completion")
        named = [str(row[name]) for name in SUBSETS if name in row]
        subset = {"subset": named[0]} if named else {}
        for k, text in enumerate([*good, *bad]):
            yield {"uid": number, "k": k, "prompt": prompt, "completion": text, "good": k < len(good), **subset}
