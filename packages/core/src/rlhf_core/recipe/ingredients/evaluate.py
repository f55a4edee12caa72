"""The ingredient `evaluate`: evaluators on a model, as `rlhf-run eval` runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import OptionError, RunStopped
from rlhf_core.recipe.ingredients.settings import check_flags, flags, merge, names_provider
from rlhf_core.recipe.process import rlhf_run
from rlhf_core.util.atomic_files import write_text

__all__ = ["Evaluate"]


@dataclass(frozen=True)
class Evaluate(Ingredient):
    """Measure a model with evaluators: held-out reward, pass@k, win rate, attacks."""

    settings: dict[str, Any]
    """options of `rlhf-run eval`: `evaluator`, and `reward`, `data` and `sampling` as it needs them"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {
        "model": "model",
        "reference": "model",
        "rows": "dataset",
        "reward": "model",
    }
    optional: ClassVar[frozenset[str]] = frozenset({"reference", "rows", "reward"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"metrics": "metrics"}

    def __post_init__(self) -> None:
        if "evaluator" not in self.settings:
            raise OptionError("settings", "needs evaluator = NAME")

    def check_inputs(self, given: Set[str]) -> None:
        """Check that options of a reward belong to one.

        Raises:
            OptionError: the settings have a table `reward` without `use`, and the step reads no reward model.
        """
        if "reward" in self.settings and "reward" not in given and not names_provider(self.settings, "reward"):
            raise OptionError("settings", 'needs reward = {use = "NAME"}, or the step reads.reward = ARTIFACT')

    def check(self) -> None:
        """Check that `rlhf-run eval` has these options.

        Raises:
            UsageError: one is unknown, or a value does not fit.
        """
        given = {"reward": {"use": "model", "model": "FOLDER"}} if "reward" in self.settings else {}
        check_flags(
            "eval", self.settings if names_provider(self.settings, "reward") else merge(given, self.settings), "MODEL"
        )

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Measure it.

        Raises:
            RunStopped: an evaluator failed; the exception has its exit code.
        """
        wired: dict[str, Any] = {"seed": context.seed, "output": str(context.folder / "evaluation")}
        if "reference" in context.inputs:
            wired["reference"] = {"model": str(context.inputs["reference"].path)}
        if "rows" in context.inputs:  # every row of the file is held out
            path = str(context.inputs["rows"].path)
            wired["data"] = {"use": "json", "path": path, "heldout_path": path}
        if "reward" in context.inputs:
            use = {} if names_provider(self.settings, "reward") else {"use": "model"}
            wired["reward"] = {**use, "model": str(context.inputs["reward"].path)}
        words = ["eval", str(context.inputs["model"].path), *flags(merge(self.settings, wired))]
        log = context.folder / "log.txt"
        printed = rlhf_run(words, context.registry, log)
        found = next((line for line in reversed(printed.splitlines()) if line.startswith("{")), None)
        if found is None:
            raise RunStopped(f"rlhf-run eval printed no metrics; see {log}")
        path_ = context.folder / "metrics.json"
        write_text(path_, json.dumps(json.loads(found)) + "\n")
        return {"metrics": Artifact("metrics", path_)}
