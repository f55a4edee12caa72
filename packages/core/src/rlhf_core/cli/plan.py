"""`rlhf-run plan ALGORITHM [flags of a run]`: what the run needs on each device, whether it fits, and how long a step takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.commands import Command
from rlhf_core.forecast.options import PlanOptions
from rlhf_core.launcher.sharing import SharingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.forecast.forecast import Forecast

__all__ = ["PlanCommand"]


@dataclass(frozen=True)
class PlanCommand(Command):
    """Forecast memory per role and device, and seconds per phase, of the run that the same flags start; nothing is started.

    The exit code is 1 if the run does not fit the devices.
    """

    plan: PlanOptions = PlanOptions()
    """devices and lengths of rows"""

    reads_run: ClassVar[bool] = True

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.forecast.forecast import forecast
        from rlhf_core.forecast.table import forecast_table

        found = forecast(context.config, self.plan)
        print(json.dumps(found.as_dict()) if self.plan.json else forecast_table(found))
        for line in _notes_on_turns(context.config, found) if found.fits is False and not self.plan.json else ():
            print(line)
        return int(found.fits is False)


def _notes_on_turns(config: RunConfig, found: Forecast) -> Iterator[str]:
    """Yield the line on roles that wait in main memory while others work, if the run's launcher lets them."""
    launcher = config.providers.get("launcher")
    if (
        not isinstance(launcher, SharingOptions)
        or launcher.share_memory == "off"
        or config.ahead
        or len(found.roles) < 2
    ):
        return
    largest = max(
        role.memory.resident + max(role.memory.training, role.memory.inference, role.memory.cache)
        for role in found.roles.values()
    )
    verdict = "fits" if largest <= found.usable else "does not fit either"
    yield (
        "note: a run takes turns on devices that cannot hold all roles (--launcher.share-memory); the largest role alone, "
        f"{largest / 2**30:.3g} GiB, {verdict}"
    )
