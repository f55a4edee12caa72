"""Decide whether roles and rollout engine take turns on a device, and within how many bytes.

The forecast of the run has the memory of each alone, and of all together. With `auto` they take turns where a CUDA
device cannot hold all. One that does not fit alone is refused before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.memory import RoleMemory
from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import OptionError, UsageError, option, run_option
from rlhf_core.launcher.residents import GIB, Residents
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan

__all__ = ["Sharing", "SharingOptions", "companions", "expected_memory", "plan_sharing"]

RESERVE = 0.08
"""Share of a device that no tensor takes: the CUDA context, libraries, fragmentation; that of `rlhf-run plan`."""


@dataclass(frozen=True)
class SharingOptions:
    """Options of launchers whose roles and engine may share a device."""

    share_memory: Literal["auto", "on", "off"] = "auto"
    """let roles and rollout engine take turns on a device: inactive ones wait in host memory while room is short.
    `auto` does so on CUDA devices that cannot hold all of them by forecast"""
    share_gib: float = 0.0
    """maximum memory of a device that roles and rollout engine hold at the same time, in GiB; 0 takes 92 % of the
    device"""

    def __post_init__(self) -> None:
        at_least(0, self, "share_gib")


@dataclass(frozen=True)
class Sharing:
    """Turns on one set of devices."""

    residents: Residents
    memory: Mapping[str, RoleMemory]
    """forecast memory of each role"""


def plan_sharing(
    options: SharingOptions, plan: Plan, device_bytes: int, ranks: int, names: Sequence[str], engine: bool
) -> Sharing | None:
    """Return how these roles, and rollout engines with their own weights (`engine`), take turns on a device.

    Args:
        options: of the launcher.
        plan: the run.
        device_bytes: memory of the device; 0 on a CPU.
        ranks: of the roles.
        names: roles on the device.
        engine: an engine with its own weights is on it too.

    Returns:
        None if they all stay on it.

    Raises:
        UsageError: one does not fit alone, or the options contradict each other.
    """
    config = plan.config
    budget = round(options.share_gib * GIB) or int(device_bytes * (1 - RESERVE))
    if options.share_memory == "off" or len(names) + engine < 2:
        return None
    if options.share_memory == "auto" and (config.ahead or not device_bytes):
        return None
    if config.ahead:
        raise OptionError(
            "share_memory", f"on: sampling ahead uses the engine while roles train; leave out {run_option('ahead')}"
        )
    if not budget:
        raise OptionError("share_memory", f"on: there is no memory limit on CPUs; pass {option('share_gib')}")
    memory = expected_memory(plan, budget, ranks)
    needed = _needs(memory, names, engine, copies=config.providers["rollout"].exact if engine else False)
    together = sum(stays for stays, _ in needed.values()) + max(work for _, work in needed.values())
    if options.share_memory == "auto" and together <= budget:
        return None
    for name, (stays, work) in needed.items():
        if stays + work > budget:
            raise UsageError(
                f"the forecast for the {name} alone is {(stays + work) / GIB:.3g} GiB of a device, but the limit is "
                f"{budget / GIB:.3g}; raise {run_option('launcher.share_gib')}, lower {run_option('micro_tokens')} "
                "or the number of sampled tokens, or shard it over more devices"
            )
    log.info(
        f"{', '.join(needed)} take turns on a device: the forecast for all is {together / GIB:.3g} GiB, and the "
        f"limit is {budget / GIB:.3g}"
    )
    return Sharing(Residents(budget), memory)


def _needs(
    memory: Mapping[str, RoleMemory], names: Sequence[str], engine: bool, copies: bool
) -> dict[str, tuple[int, int]]:
    """Return the bytes that each resident keeps while it is awake, and those that its largest call adds.

    An engine in another process that would sample from a role's own weights `copies` them.
    """
    needed = {}
    for name in names:
        each = memory[name]
        needed[name] = (each.resident, max(each.training, each.inference, 0 if engine else each.cache))
    if engine:
        sampled = [memory[name] for name in names if memory[name].cache]
        held = max((each.cache + (each.weights if copies else 0) for each in sampled), default=0)
        needed["rollout engine"] = (held, 0)
    return needed


def expected_memory(plan: Plan, budget: int, ranks: int) -> Mapping[str, RoleMemory]:
    """Return the forecast memory of each role on a device."""
    from rlhf_core.forecast.forecast import forecast
    from rlhf_core.forecast.options import PlanOptions

    even = ranks if plan.config.batch_size % ranks == 0 else 1  # on fewer devices each role takes more
    found = forecast(plan.config, PlanOptions(gpus=even, gpu_gib=budget / GIB, reserve=0.0))
    return {name: role.memory for name, role in found.roles.items()}


def companions(plan: Plan, name: str) -> list[str]:
    """Return the roles whose logits a loss of this role compares with its own."""
    outputs = {output for _, term in plan.roles[name].terms for output in term.outputs}
    return sorted({output.rpartition(".")[0] for output in outputs if "." in output})
