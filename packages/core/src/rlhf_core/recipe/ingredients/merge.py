"""The ingredient `merge`: an adapter and its base as one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from shutil import rmtree
from typing import ClassVar, Literal

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.recipe.process import rlhf_run

__all__ = ["Merge"]


@dataclass(frozen=True)
class Merge(Ingredient):
    """Merge an adapter into its base, so that the next step can start from it."""

    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """dtype of the weights that are written; `base` is the base model's own"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"model": "model"}
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"model": "model"}

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Merge it."""
        merged = context.folder / "model"
        rmtree(merged, ignore_errors=True)  # the command writes a new folder only
        words = ["merge-lora", str(context.inputs["model"].path), "--output", str(merged), "--dtype", self.dtype]
        rlhf_run(words, context.registry, context.folder / "log.txt")
        return {"model": Artifact("model", merged)}
