"""The ingredient `generate`: K completions for every prompt, by several processes, merged without losing a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.contract.options import FREE
from rlhf_core.errors import DataError, OptionError
from rlhf_core.recipe.ingredients.settings import check_flags, flags, merge
from rlhf_core.recipe.process import rlhf_run_all
from rlhf_core.util.atomic_files import write_text

__all__ = ["Generate"]


@dataclass(frozen=True)
class Generate(Ingredient):
    """Sample completions for every row of a data set. A step that was stopped continues after the last whole row."""

    n: int = 4
    """completions per prompt"""
    settings: dict[str, Any] = field(default_factory=dict)
    """options of `rlhf-run generate`, such as `{sampling = {temperature = 0.7}, rollout = "vllm"}`"""
    workers: int = field(default=1, metadata=FREE)
    """processes at a time; changes speed, never a completion"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"model": "model", "rows": "dataset"}
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"completions": "dataset"}

    def __post_init__(self) -> None:
        for name in ("n", "workers"):
            if getattr(self, name) < 1:
                raise OptionError(name, f"must be at least 1, not {getattr(self, name)}")

    def check(self) -> None:
        """Check that `rlhf-run generate` has these options.

        Raises:
            UsageError: one is unknown, or a value does not fit.
        """
        check_flags("generate", merge(self.settings, {"sampling": {"n": self.n}}))

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Sample, and merge what the processes wrote in the order of the prompts.

        Raises:
            RunStopped: a process failed; the exception has its exit code.
            DataError: every prompt was too long.
        """
        wired = {
            "model": str(context.inputs["model"].path),
            "data": {"use": "json", "path": str(context.inputs["rows"].path)},
            "sampling": {"n": self.n},
            "seed": context.seed,
        }
        # another number of processes must not continue the files of this one
        parts = [context.folder / f"part-{worker}-of-{self.workers}.jsonl" for worker in range(self.workers)]
        commands = [
            (
                [
                    "generate",
                    *flags(merge(self.settings, wired)),
                    "--shard",
                    f"{i}/{self.workers}",
                    "--output",
                    str(part),
                ],
                context.folder / f"log-{i}.txt",
            )
            for i, part in enumerate(parts)
        ]
        rlhf_run_all(commands, context.registry)
        lines = [line for part in parts for line in _lines(part)]
        if not lines:
            raise DataError("every prompt is longer than max_prompt_tokens, so nothing was generated; raise it")
        path = context.folder / "completions.jsonl"
        write_text(path, "".join(line + "\n" for line in sorted(lines, key=_place)))
        return {"completions": Artifact("dataset", path)}


def _lines(part: Any) -> list[str]:
    """Return the lines of a part; none if every prompt of its shard was too long."""
    return [line for line in part.read_text(encoding="utf-8").split("\n") if line] if part.exists() else []


def _place(line: str) -> tuple[int, int]:
    row = json.loads(line)
    return row["uid"], row["k"]
