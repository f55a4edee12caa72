"""The ingredient `train`: any algorithm with any options, as `rlhf-run --config` runs it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any, ClassVar

from rlhf_core.checkpoint.manifest import valid_checkpoints
from rlhf_core.config.option_fields import default_of, option_fields
from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.contract.options import FREE, TrainedOptions
from rlhf_core.errors import OptionError
from rlhf_core.recipe.ingredients.settings import merge, names_provider
from rlhf_core.recipe.process import rlhf_run
from rlhf_core.util.atomic_files import fresh_folder, write_text

__all__ = ["Train"]

PLACES: Mapping[str, str] = {
    "model": "model",
    "data": "data.path",
    "reference": "reference.model",
    "reward": "reward.model",
    "critic": "critic.model",
    "reward_state": "reward.state",
}
"""The option of a run that holds the path of an input; `state` is the optimizer's of the role that is trained."""

USES: Mapping[str, str] = {"data": "json", "reward": "model"}
"""The providers that read such paths, by kind."""

WIRED = ("model", "seed", "output", "resume")
"""Options of a run that the ingredient sets itself."""

OPTIMIZER = "optimizer.safetensors"
"""The optimizer's state in a checkpoint, in `roles/ROLE`."""


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
        "state": "state",
        "reward_state": "state",
    }
    optional: ClassVar[frozenset[str]] = frozenset(inputs) - {"model"}
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"model": "model", "run": "run", "state": "state"}

    def __post_init__(self) -> None:
        if "algorithm" not in self.settings:
            raise OptionError("settings", "needs algorithm = NAME")
        for name in WIRED:
            if name in self.settings:
                raise OptionError(
                    "settings", f"cannot set {name!r}, since the recipe sets it; use reads, writes and seed"
                )

    def check_inputs(self, given: Set[str]) -> None:
        """Check that the algorithm has its data and its reward.

        Raises:
            OptionError: neither the settings name one, nor does the step read it.
        """
        from rlhf_core.plugins.registry import default_registry

        registry = default_registry()
        kinds = registry.resolve("algorithm", self._algorithm()).defaults
        for kind, use in USES.items():
            usual = kinds.get(kind)
            if kind in given or usual is None or kind in self.settings:
                continue
            fields = option_fields(registry.resolve(kind, usual)) if usual else ()
            if not usual or any(default_of(each, None) is MISSING for each in fields):
                raise OptionError(
                    "settings", f'needs {kind} = {{use = "{use}", …}}, or the step reads.{kind} = ARTIFACT'
                )

    def check(self) -> None:
        """Check that the algorithm and its providers have these options.

        Raises:
            UsageError: one is unknown, or a value does not fit.
        """
        from rlhf_core.config.builder import from_names
        from rlhf_core.plugins.registry import default_registry

        registry = default_registry()
        kinds = registry.resolve("algorithm", self._algorithm()).defaults
        given: dict[str, Any] = {"model": "tiny"}
        for kind, use in USES.items():
            chosen, place = self.settings.get(kind, {}), PLACES[kind].partition(".")[2]
            named = chosen if isinstance(chosen, str) else chosen.get("use", use)
            if kind in kinds and place in {each.name for each in option_fields(registry.resolve(kind, named))}:
                given[kind] = {"use": named, place: "FILE"}  # an input may give it
        from_names(merge(self.settings, given), registry)

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Run it.

        Raises:
            RunStopped: the run failed; the exception has its exit code.
        """
        import tomli_w

        output, state = context.folder / "run", context.folder / "state"
        if not state.exists():  # else it was stopped while its checkpoints were removed
            settings = merge(self.settings, self._run_options(context))
            write_text(context.folder / "settings.toml", tomli_w.dumps(settings))
            words = ["--config", str(context.folder / "settings.toml"), "--resume", "auto"]
            rlhf_run(words, context.registry, context.folder / "log.txt")
            _keep_state(settings, output, state)
        if not self.keep_checkpoints:
            rmtree(output / "checkpoints", ignore_errors=True)
        made = {"model": Artifact("model", output / "model"), "run": Artifact("run", output)}
        return {**made, "state": Artifact("state", state)}

    def _algorithm(self) -> str:
        """Return the name of the algorithm."""
        algorithm = self.settings["algorithm"]
        return str(algorithm.get("use", "") if isinstance(algorithm, Mapping) else algorithm)

    def _run_options(self, context: IngredientContext) -> dict[str, Any]:
        """Return the options of the run that the recipe sets."""
        from rlhf_core.plugins.registry import default_registry

        role = default_registry().resolve("algorithm", self._algorithm()).policy
        places = {**PLACES, "state": f"{role}.optim.state"}
        wired: dict[str, Any] = {"seed": context.seed, "output": str(context.folder / "run")}
        for name, artifact in context.inputs.items():
            *above, option = places[name].split(".")
            table = wired
            for key in above:
                table = table.setdefault(key, {})
            if name in USES and not names_provider(self.settings, name):
                table["use"] = USES[name]
            table[option] = str(artifact.path)
        return wired


def _keep_state(settings: Mapping[str, Any], output: Path, state: Path) -> None:
    """Copy what the optimizer of the trained role hands on from the newest checkpoint; the folder is empty if it is nothing."""
    from rlhf_core.config.builder import from_names

    config = from_names(settings)
    role = config.algorithm.policy
    with fresh_folder(state) as folder:
        (folder / "roles" / role).mkdir(parents=True)
        options = config.roles[role]
        if isinstance(options, TrainedOptions) and options.optim.hands_on:
            copyfile(valid_checkpoints(output)[-1] / "roles" / role / OPTIMIZER, folder / "roles" / role / OPTIMIZER)
