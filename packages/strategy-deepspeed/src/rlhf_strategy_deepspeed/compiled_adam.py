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
            made = adam(groups, adamw_mode=True)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"DeepSpeed cannot compile its AdamW for CPUs on this machine ({reason}); install a C++ compiler and "
            f"ninja, or leave out {option('cpu_adam')}"
        ) from error
    made.register_step_pre_hook(_forget_powers)
    return made


def _forget_powers(optimizer: Any, *_ignored: Any) -> None:
    """Let the next update take the powers of the betas, for the bias correction, from its step's number.

    The compiled code keeps them and multiplies by the betas in float32, so that a resumed run, which begins with the powers
    themselves, would round differently. A count of 0, in an update of numbers that nobody reads, is what it forgets them by.
    """
    unread = [torch.zeros(1) for _ in range(4)]
    group = optimizer.param_groups[0]
    settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], False)
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, *settings, *unread)
