"""`rlhf-run plan ALGORITHM [flags of a run]`: what the run needs on each device, whether it fits, and how long a step takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.commands import Command
from rlhf_core.forecast.options import PlanOptions

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

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
        return int(found.fits is False)
