"""The ingredient `train`: any algorithm with any options, as `rlhf-run --config` runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from shutil import rmtree
from typing import Any, ClassVar

from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.contract.options import FREE
from rlhf_core.errors import OptionError
from rlhf_core.recipe.ingredients.settings import merge
from rlhf_core.recipe.process import rlhf_run
from rlhf_core.util.atomic_files import write_text

__all__ = ["Train"]

PLACES: Mapping[str, str] = {
    "model": "model",
    "data": "data.path",
    "reference": "reference.model",
    "reward": "reward.model",
    "critic": "critic.model",
}
"""The option of a run that holds the path of an input."""

USES: Mapping[str, str] = {"data": "json", "reward": "model"}
"""The providers that read such paths, by kind."""

WIRED = ("model", "seed", "output", "resume")
"""Options of a run that the ingredient sets itself."""


@dataclass(frozen=True)
class Train(Ingredient):
    """Train a model with any algorithm. A step that was stopped continues from its newest checkpoint."""

    settings: dict[str, Any]
    """options of the run as in its configuration file: `algorithm`, `steps`, tables such as `actor.optim`"""
    keep_checkpoints: bool = field(default=False, metadata=FREE)
    """keep the checkpoints when training has ended"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {
        "model": "model",
        "data": "dataset",
        "reference": "model",
        "reward": "model",
        "critic": "model",
    }
    optional: ClassVar[frozenset[str]] = frozenset({"data", "reference", "reward", "critic"})
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"model": "model", "run": "run"}

    def __post_init__(self) -> None:
        if "algorithm" not in self.settings:
            raise OptionError("settings", "needs algorithm = NAME")
        for name in WIRED:
            if name in self.settings:
                raise OptionError(
                    "settings", f"cannot have {name!r}, which the recipe sets; use reads, writes and seed"
                )

    def check(self) -> None:
        """Check that the algorithm and its providers have these options.

        Raises:
            UsageError: one is unknown, or a value does not fit.
        """
        from rlhf_core.config.builder import from_names
        from rlhf_core.plugins.registry import default_registry

        registry = default_registry()
        algorithm = self.settings["algorithm"]
        name = algorithm.get("use", "") if isinstance(algorithm, Mapping) else algorithm
        kinds = registry.resolve("algorithm", name).defaults
        given: dict[str, Any] = {"model": "tiny"}
        for kind, use in USES.items():
            chosen = self.settings.get(kind, {})
            if kind in kinds and isinstance(chosen, Mapping) and "use" not in chosen:  # an input may give it
                given[kind] = {"use": use, PLACES[kind].partition(".")[2]: "FILE"}
        from_names(merge(self.settings, given), registry)

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Run it.

        Raises:
            RunStopped: the run failed; the exception has its exit code.
        """
        import tomli_w

        output = context.folder / "run"
        wired: dict[str, Any] = {"seed": context.seed, "output": str(output)}
        for name, artifact in context.inputs.items():
            *above, option = PLACES[name].split(".")
            table = wired
            for key in above:
                table = table.setdefault(key, {"use": USES[key]} if key in USES else {})
            table[option] = str(artifact.path)
        config = context.folder / "settings.toml"
        write_text(config, tomli_w.dumps(merge(self.settings, wired)))
        rlhf_run(["--config", str(config), "--resume", "auto"], context.registry, context.folder / "log.txt")
        if not self.keep_checkpoints:
            rmtree(output / "checkpoints", ignore_errors=True)
        return {"model": Artifact("model", output / "model"), "run": Artifact("run", output)}
