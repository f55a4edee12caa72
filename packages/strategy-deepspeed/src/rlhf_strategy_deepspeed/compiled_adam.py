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
        raise OptionError(
            "cpu_adam", f"works only with AdamW, but the role's optimizer is {type(optimizer).__name__}; leave it out"
        )
    adam = library().ops.adam.DeepSpeedCPUAdam
    groups = [{name: group[name] for name in GROUP} for group in optimizer.param_groups]
    log.info("loading DeepSpeed's AdamW for CPUs; the first time it is compiled, which takes minutes")
    try:
        with silence_deepspeed():
            return adam(groups, adamw_mode=True)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"DeepSpeed cannot compile its AdamW for CPUs on this machine ({reason}); install a C++ compiler and "
            f"ninja, or leave out {option('cpu_adam')}"
        ) from error
