"""The checkpoints of one run: the object that saves, restores and rotates them, whatever runs the loop.

It knows neither the run nor its state: the state is plain data, and roles write themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint.background import Background
from rlhf_core.checkpoint.restoring import restore
from rlhf_core.checkpoint.rotation import Rotation, read_best, which_is_better
from rlhf_core.checkpoint.saving import SharedState, save

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.roles import Role

__all__ = ["Checkpoints"]

Evaluations = Iterable[tuple[int, Mapping[str, float]]]


class Checkpoints:
    """OUTPUT/checkpoints of a run.

    Args:
        config: options of the run; it reads `output`, `keep*`, `save_async` and the strategy's name.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.strategy = config.names.get("strategy", "")
        self.by_parameter: bool = config.providers["strategy"].by_parameter
        self.background = Background()
        """a checkpoint that is being written in the background"""

    def save(
        self,
        state: Mapping[str, Any],
        roles: Mapping[str, Role],
        engine_states: Callable[[], Mapping[str, Any]],
        world: World,
    ) -> float:
        """Write OUTPUT/checkpoints/step-N unless it exists, then remove what is not kept. Every rank takes part.

        With `--save-async`, and a strategy that can copy its state, the writing goes to the background.

        Args:
            state: plain data with the keys `step`, `metrics` and `evaluations`, and whatever else the run needs.
            roles: the trained roles by name.
            engine_states: returns this rank's states of engines by place, in separate memory; called if one is written.
            world: the ranks that save together.

        Returns:
            the seconds that an earlier background save took and that were not returned yet.
        """
        seconds = self.background.wait()  # one at a time
        rotation = self._rotation(state["evaluations"])
        shared = SharedState({**state, "strategy": self.strategy, "by_parameter": self.by_parameter}, self.output)
        save(shared, roles, engine_states, world, rotation, self.background if self.config.save_async else None)
        return seconds

    def restore(self, roles: Mapping[str, Role], world: World) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Load the newest valid checkpoint into `roles`.

        Returns:
            the state saved with it, and the states of this rank's engines by place; None if there is no checkpoint.

        Raises:
            UsageError: every checkpoint is damaged, another strategy wrote it, or ranks cannot share what it has of engines.
        """
        return restore(self.output, self.strategy, self.by_parameter, roles, world)

    def best(self, world: World) -> Path | None:
        """Return the best checkpoint by `--keep-best`; None without one. The leader looks, for all ranks."""
        looks = bool(self.config.keep_best) and world.rank == 0
        found: list[Path | None] = world.gather(read_best(self.output) if looks else None)
        return found[0]

    def rotate(self, evaluations: Evaluations) -> None:
        """Remove the checkpoints that are not kept, given all that was measured so far. The leader calls this."""
        self._rotation(evaluations)(self.output)

    def _rotation(self, evaluations: Evaluations) -> Rotation:
        config, name = self.config, self.config.keep_best
        measured = {step: float(metrics[name]) for step, metrics in evaluations if name in metrics}
        return Rotation(config.keep, config.keep_gb, name, which_is_better(name, config.keep_best_mode), measured)
