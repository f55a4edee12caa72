"""Context of an ingredient: inputs, settings and output folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.ingredients import Artifact

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.plugins.registry import Registry

__all__ = ["StepContext"]


@dataclass(frozen=True)
class StepContext:
    """An `IngredientContext` of a step of a recipe."""

    folder: Path
    inputs: Mapping[str, Artifact]
    seed: int
    iteration: int
    registry: Registry

    def config(self, algorithm: str | object, **options: Any) -> RunConfig:
        """Return a run's configuration as `make_config` does, with the step's seed and an `output` in its folder."""
        from rlhf_core.config.builder import make_config

        return make_config(
            algorithm, registry=self.registry, **{"seed": self.seed, "output": str(self.folder / "run"), **options}
        )

    def seed_libraries(self) -> None:
        """Seed the generators of Python, numpy and torch."""
        from rlhf_core.util.random_states import seed_libraries

        seed_libraries(self.seed)
