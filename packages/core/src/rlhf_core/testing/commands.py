"""Checks of the kinds `command` and `ingredient`, which do their work outside of a run's loop."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.commands import Command, CommandContext
from rlhf_core.contract.ingredients import ARTIFACT_KINDS, FOLDERS, Artifact, Ingredient
from rlhf_core.plugins.registry import Registry
from rlhf_core.testing.providers import check_provider

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig

__all__ = ["TinyIngredientContext", "check_command", "check_ingredient"]


def check_command(command: Command, context: CommandContext | None = None) -> int:
    """A command is a provider with documented options, and ends with an exit code when it is called.

    It is called once, in an empty working folder.

    Args:
        command: the provider.
        context: the plugins and the run that its flags describe; those of core with the usual providers if absent.

    Returns:
        the exit code.

    Raises:
        AssertionError: a check fails; the message states what the contract requires.
        UsageError: a provider without a usual name must be chosen, so pass a `context`.
    """
    from rlhf_core.run.command import context_of

    check_provider(command)
    name = type(command).__qualname__
    assert isinstance(command, Command), f"{name} must inherit rlhf_core.Command"
    context = context_of(command, Registry(autoload=False)) if context is None else context
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        code = command(context)
    assert isinstance(code, int), f"{name} must return an exit code, not {code!r}"
    assert 0 <= code <= 255, f"{name} must return an exit code from 0 to 255, not {code}"
    return code


@dataclass(frozen=True)
class TinyIngredientContext:
    """An `IngredientContext` for tests."""

    folder: Path
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    seed: int = 0
    iteration: int = 0
    registry: Registry = field(default_factory=lambda: Registry(autoload=False))

    def config(self, algorithm: str | object, **options: Any) -> RunConfig:
        """Return a run's configuration as `make_config` does."""
        from rlhf_core.config.builder import make_config

        given = {"seed": self.seed, "output": str(self.folder / "run"), **options}
        return make_config(algorithm, registry=self.registry, **given)


def check_ingredient(ingredient: Ingredient, inputs: Mapping[str, Artifact] | None = None) -> Mapping[str, Artifact]:
    """An ingredient declares its artifacts, makes exactly those, in its folder, and the same twice.

    It is called twice, each time in an empty folder. Files are compared byte for byte; folders by the names in them.

    Args:
        ingredient: the provider.
        inputs: the artifacts that it reads, by name; they must match its `inputs`.

    Returns:
        what it made; the files themselves are gone.

    Raises:
        AssertionError: a check fails; the message states what the contract requires.
    """
    check_provider(ingredient)
    name = type(ingredient).__qualname__
    assert isinstance(ingredient, Ingredient), f"{name} must inherit rlhf_core.Ingredient"
    for which, declared in (("inputs", ingredient.inputs), ("outputs", ingredient.outputs)):
        unknown = {each: kind for each, kind in declared.items() if kind not in ARTIFACT_KINDS}
        assert not unknown, f"{name}.{which} has unknown kinds {unknown}; kinds are {', '.join(ARTIFACT_KINDS)}"
    inputs = inputs or {}
    given = {each: artifact.kind for each, artifact in inputs.items()}
    wanted = {
        each: kind for each, kind in ingredient.inputs.items() if each in given or each not in ingredient.optional
    }
    assert given == wanted, f"{name} reads {dict(ingredient.inputs)}, but the check was given {given}"
    contents = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            made = ingredient(TinyIngredientContext(Path(folder), inputs))
            kinds = {each: artifact.kind for each, artifact in made.items()}
            assert kinds == dict(ingredient.outputs), f"{name} must make {dict(ingredient.outputs)}, not {kinds}"
            contents.append({each: _content(name, each, artifact, Path(folder)) for each, artifact in made.items()})
    assert contents[0] == contents[1], f"{name} must make the same artifacts from the same inputs and seed"
    return made


def _content(name: str, output: str, artifact: Artifact, folder: Path) -> object:
    """Return what two equal artifacts have in common, after checking that it is there and of its kind."""
    path = artifact.path
    assert path.exists(), f"{name}: the output {output!r} is not there: {path}"
    assert path.resolve().is_relative_to(folder.resolve()), f"{name}: the output {output!r} must be in context.folder"
    if artifact.kind in FOLDERS:
        assert path.is_dir(), f"{name}: the output {output!r} is a {artifact.kind}, which is a folder"
        return sorted(str(each.relative_to(path)) for each in path.rglob("*"))
    assert path.is_file(), f"{name}: the output {output!r} is a {artifact.kind}, which is a file"
    if artifact.kind == "metrics":
        metrics = json.loads(path.read_text(encoding="utf-8"))
        numbers = isinstance(metrics, dict) and all(type(value) in (int, float) for value in metrics.values())
        assert numbers, f"{name}: the output {output!r} must contain one JSON object of numbers"
    return path.read_bytes()
