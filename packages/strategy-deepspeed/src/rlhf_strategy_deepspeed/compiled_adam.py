"""DeepSpeed's AdamW for weights in main memory, with the groups and rates of the role's own optimizer."""

from __future__ import annotations

import subprocess
from typing import Any

from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.lazy import torch
from rlhf_core.util.messages import log
from rlhf_strategy_deepspeed.engine import library, silence_deepspeed

__all__ = ["compiled_adam"]

GROUP = ("params", "lr", "betas", "eps", "weight_decay")
"""options of a group of parameters in both"""


def compiled_adam(optimizer: torch.optim.Optimizer) -> Any:
    """Return DeepSpeed's AdamW in the place of torch's, which computes the same. It is compiled where it has not been.

    Raises:
        UsageError: the optimizer is another one, or this machine cannot compile it.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise OptionError("cpu_adam", f"is AdamW, and the role's optimizer is {type(optimizer).__name__}; leave it out")
    adam = library().ops.adam.DeepSpeedCPUAdam
    groups = [{name: group[name] for name in GROUP} for group in optimizer.param_groups]
    log.info("deepspeed's AdamW for CPUs is loaded, and compiled where it is new (minutes)")
    try:
        with silence_deepspeed():
            return adam(groups, adamw_mode=True)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"deepspeed cannot compile its AdamW for CPUs here ({reason}); install a C++ compiler and ninja, or leave out "
            f"{option('cpu_adam')}"
        ) from error
