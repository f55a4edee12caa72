"""An ingredient of a recipe: a frozen dataclass that turns artifacts into artifacts, such as a data set into a model.

    @dataclass(frozen=True)
    class CountRows(Ingredient):
        \"\"\"Count the rows of a data set.\"\"\"

        inputs: ClassVar[Mapping[str, ArtifactKind]] = {"rows": "dataset"}
        outputs: ClassVar[Mapping[str, ArtifactKind]] = {"counts": "metrics"}

        def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
            count = len(context.inputs["rows"].path.read_text().splitlines())
            path = context.folder / "counts.json"
            path.write_text(json.dumps({"rows": count}))
            return {"counts": Artifact("metrics", path)}

A recipe joins ingredients by the names and kinds of artifacts, so that it can be checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from rlhf_core.contract.providers import Provider

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.registry_view import RegistryView

__all__ = ["ARTIFACT_KINDS", "FOLDERS", "Artifact", "ArtifactKind", "Ingredient", "IngredientContext"]

ArtifactKind = Literal["model", "dataset", "table", "metrics", "run", "state", "figure"]
"""`model`: a Hugging Face folder. `dataset`: a JSONL file that the data provider `json` reads. `table`: a CSV file.
`metrics`: a JSON object of numbers by name. `run`: an OUTPUT folder of `rlhf-run`. `state`: a folder with the state of an
optimizer that a later training continues. `figure`: an SVG file."""

ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)
"""Every kind of artifact."""

FOLDERS: frozenset[ArtifactKind] = frozenset({"model", "run", "state"})
"""The kinds of artifacts that are folders; the others are files."""


@dataclass(frozen=True)
class Artifact:
    """A file or folder that an ingredient made or reads."""

    kind: ArtifactKind
    path: Path


class IngredientContext(Protocol):
    """Everything an ingredient may use while it works."""

    @property
    def folder(self) -> Path:
        """Existing folder of the ingredient; every output is in it."""
        ...

    @property
    def inputs(self) -> Mapping[str, Artifact]:
        """An artifact for each name of the ingredient's `inputs`, of the declared kind; `optional` ones may be absent."""
        ...

    @property
    def seed(self) -> int:
        """The seed of the step: the same seed and inputs give the same outputs."""
        ...

    @property
    def iteration(self) -> int:
        """The iteration of the recipe that the step belongs to, from 0."""
        ...

    @property
    def registry(self) -> RegistryView:
        """The installed plugins and providers."""
        ...

    def config(self, algorithm: str | object, **options: Any) -> RunConfig:
        """Return a run's configuration as `make_config` does, with `seed` and an `output` in `folder` unless given."""
        ...


class Ingredient(Provider):
    """The base of ingredients."""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {}
    """the kind of each artifact that the ingredient reads, by name"""
    optional: ClassVar[frozenset[str]] = frozenset()
    """the names of `inputs` that a recipe may leave out"""
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {}
    """the kind of each artifact that the ingredient makes, by name"""

    def check_inputs(self, given: Set[str]) -> None:
        """Check that the options and the inputs that a recipe gives fit together. Called when the recipe is read.

        Args:
            given: names of `inputs`; all but those of `optional` are among them.

        Raises:
            UsageError: they do not; the message states what to give.
        """

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Do the work and return an artifact for each name of `outputs`.

        Raises:
            UsageError: an input does not hold what the ingredient reads.
        """
        raise NotImplementedError
