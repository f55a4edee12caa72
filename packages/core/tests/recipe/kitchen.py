"""Ingredients for tests, which need no model, and recipes of them. Also a plugin: `-p kitchen`."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_core import hookimpl
from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import RunStopped
from rlhf_core.plugins.registry import Registry
from rlhf_core.recipe.engine import Engine
from rlhf_core.recipe.plan import Recipe


@dataclass(frozen=True)
class Sow(Ingredient):
    """Write rows."""

    rows: int = 3
    """number of rows"""
    secret: str = ""
    """must not be written down"""

    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"seeds": "dataset"}

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        path = context.folder / "seeds.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(self.rows)))
        return {"seeds": Artifact("dataset", path)}


@dataclass(frozen=True)
class Grow(Ingredient):
    """Add to a plant the number of its seeds; `drawn` is from a global generator."""

    by: int = 1
    """height for each seed"""
    note: str = ""
    """what a text with numbers of the recipe became"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"plant": "metrics", "seeds": "dataset", "sun": "metrics"}
    optional: ClassVar[frozenset[str]] = frozenset({"plant", "sun"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"plant": "metrics"}

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        before = json.loads(context.inputs["plant"].path.read_text())["height"] if "plant" in context.inputs else 0
        height = before + self.by * len(context.inputs["seeds"].path.read_text().splitlines())
        path = context.folder / "plant.json"
        path.write_text(json.dumps({"height": height, "iteration": context.iteration, "drawn": random.random()}))
        return {"plant": Artifact("metrics", path)}


@dataclass(frozen=True)
class Wait(Ingredient):
    """Count how often it was begun, and stop in the first of them."""

    how: str = "fail"
    """fail, kill, or wrong (an output that is not declared)"""
    together: str = ""
    """folder in which it waits until another one of its kind is there"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"seeds": "dataset"}
    optional: ClassVar[frozenset[str]] = frozenset({"seeds"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"begun": "metrics"}

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        if self.together:
            _meet(Path(self.together), context.folder.name)
        path = context.folder / "begun.json"
        begun = json.loads(path.read_text())["begun"] + 1 if path.exists() else 1
        path.write_text(json.dumps({"begun": begun}))
        if begun == 1 and not self.together:
            if self.how == "wrong":
                return {"seeds": Artifact("dataset", path)}
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RunStopped("the ingredient failed", 7)
        return {"begun": Artifact("metrics", path)}


def _meet(folder: Path, name: str) -> None:
    """Wait until two were here."""
    folder.mkdir(exist_ok=True)
    (folder / name).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < deadline, "no other step ran at the same time"
        time.sleep(0.01)


@hookimpl
def rlhf_ingredient() -> dict[str, Any]:
    return {"sow": Sow, "grow": Grow, "wait": Wait}


def registry() -> Registry:
    """Return a registry with these ingredients."""
    made = Registry(autoload=False)
    made.register(__import__(__name__), "kitchen")
    return made


def cook(output: Path, steps: list[Any], ingredients: Mapping[str, Any], jobs: int = 1, **fields: Any) -> list[str]:
    """Run a recipe and return the steps that ran."""
    lines: list[str] = []
    engine = Engine(Recipe(steps, ingredients, output=output, **fields), registry(), lines.append)
    engine.run(jobs)
    return [line.partition(":")[0] for line in lines if line.endswith("started")]


def made(output: Path, step: str) -> dict[str, Any]:
    """Return the metrics that a step made."""
    (path,) = (output / "steps" / step).glob("[pb][le]*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
