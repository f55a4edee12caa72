"""From passes over the data to steps: `--epochs 3` of 80 rows in batches of 8 are 30 steps.

The rows that fit are counted before anything else starts, each rank its share of them, so that schedules and the time left know
the length of the run. A batch may begin in one pass and end in the next, and the last one is filled up with rows of a further
pass, unless an optimizer takes each row once (`one_pass`): then an incomplete last batch is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_core.contract.batch import Example
from rlhf_core.contract.engines import Engines
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.plan import DATA
from rlhf_core.data.prepare import SHARE, Preparer
from rlhf_core.data.shuffling import SHUFFLED
from rlhf_core.data.stream import is_indexed
from rlhf_core.errors import DataError, OptionError, UsageError, options_under, run_option
from rlhf_core.launcher.local import join_world
from rlhf_core.run.data import RunData
from rlhf_core.training.dynamic_sampling import choose_filter
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.plan import Plan

__all__ = ["count_fitting", "count_steps"]


def count_steps(plan: Plan) -> int:
    """Return the steps that `--epochs` of the plan's data are: epochs * rows that fit / rows per batch, rounded up.

    With an optimizer of one pass they are rounded down.

    Raises:
        UsageError: the passes cannot be counted, since the data has no length, a sampler does not go through it in passes, or
            a filter draws more rows than a batch has; or no row fits.
        DataError: a row cannot be read.
    """
    config = plan.config
    if not config.providers.get("sampler", SHUFFLED).epochs:
        raise OptionError(
            "/epochs", f"needs a sampler that returns every row once per pass; pass {run_option('steps', 100)}"
        )
    if choose_filter(config) is not None:
        raise OptionError("/epochs", f"cannot be counted if a filter draws extra rows; pass {run_option('steps', 100)}")
    with Engines(config.seed, plan=plan) as engines:
        with options_under("/data"):
            engines.open(config.providers["data"], "data")
        data = RunData(plan, engines)
        rows = data.rows
        if not is_indexed(rows):
            raise OptionError(
                "/epochs", f"needs data of known length, which a stream is not; pass {run_option('steps', 100)}"
            )
        preparer = Preparer(data.encoder, DATA not in plan.sources, config.providers["data"])
        try:
            fitting = count_fitting(rows, preparer, join_world())
        finally:
            preparer.close()
    if not fitting:
        raise UsageError(
            f"none of the {len(rows)} rows can be used, so {run_option('epochs')} has no data; choose other data, "
            "or raise the limits on tokens"
        )
    once = any(_takes_rows_once(plan.roles[name].options) for name in plan.trained_roles)
    batches = config.epochs * fitting / config.batch_size
    steps = math.floor(batches) if once else math.ceil(batches)
    if not steps:
        raise OptionError(
            "/batch_size",
            f"{config.batch_size} is more than the {fitting} rows, but this optimizer uses each row only once; "
            "lower it",
        )
    left = round(config.epochs * fitting) - steps * config.batch_size
    passes = f"{config.epochs:g} epoch{'' if config.epochs == 1 else 's'} of {fitting} rows"
    left_out = f" ({len(rows) - fitting} more are too long)" if fitting < len(rows) else ""
    unused = f"; the last {left} rows do not fill a batch and are not used" if left > 0 else ""
    log.info(f"{passes}{left_out} are {steps} steps of {config.batch_size}{unused}")
    return steps


def _takes_rows_once(options: ModelOptions) -> bool:
    return isinstance(options, TrainedOptions) and options.optim.one_pass


def count_fitting(rows: Sequence[Example], preparer: Preparer, world: World) -> int:
    """Return how many rows are not too long. Collective: ranks share the rows by blocks.

    Raises:
        DataError: a row cannot be read; every rank raises that of the first such row.
    """
    fitting, block = 0, max(preparer.block, SHARE)
    failure: tuple[int, str] | None = None
    for start in range(world.rank * block, len(rows), world.size * block):
        prepared = preparer([rows[i] for i in range(start, min(start + block, len(rows)))])
        failure = next(((start + k, str(row)) for k, row in enumerate(prepared) if isinstance(row, DataError)), None)
        if failure is not None:
            break
        fitting += sum(row is not None for row in prepared)
    parts = world.gather((fitting, failure))
    if failures := [each for _, each in parts if each is not None]:
        raise DataError(min(failures)[1])
    return sum(each for each, _ in parts)
