"""`forecast(config, options)`: what each role of a run needs on each device, whether it fits, and how long a step takes.

    from rlhf_core import make_config
    from rlhf_core.forecast.forecast import forecast
    from rlhf_core.forecast.options import PlanOptions

    found = forecast(make_config("grpo", model="tiny", reward="length"), PlanOptions(gpus=8, gpu="h100"))
    print(found.peak, found.fits, found.roles["actor"].memory.activations)

Nothing is downloaded but a model's config, and nothing is held on a device. All roles are on every device, as the launcher
`local` places them; the numbers of each role alone are those of a device that has no other role.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.memory import ModelSize, RoleMemory, SamplingLoad
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import DATA
from rlhf_core.errors import OptionError
from rlhf_core.forecast.options import GPUS, PlanOptions
from rlhf_core.forecast.passes import Passes, run_passes
from rlhf_core.forecast.seconds import (
    forward_operations,
    rates_of,
    sampling_seconds,
    training_seconds,
    update_seconds,
)
from rlhf_core.forecast.workload import Workload
from rlhf_core.lazy import torch
from rlhf_core.training.planner import make_plan

if TYPE_CHECKING:
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.plan import Plan, RoleSpec
    from rlhf_core.forecast.seconds import Rates

__all__ = ["Forecast", "Phase", "RoleForecast", "forecast"]

GIB = 2**30


@dataclass(frozen=True)
class RoleForecast:
    """A role on one device."""

    trained: bool
    memory: RoleMemory
    size: ModelSize
    graph: int
    """bytes that a training pass over one micro-batch keeps from forward to backward"""
    rows: int
    """rows of a micro-batch"""
    rounds: int
    """micro-batches of an optimizer step, or of a pass without gradient"""


@dataclass(frozen=True)
class Phase:
    """A part of a step."""

    name: str
    bytes: int
    """most that all roles of a device hold in it"""
    seconds: float | None
    """None where no rate is known"""


@dataclass(frozen=True)
class Forecast:
    """A run on its devices."""

    options: PlanOptions
    roles: Mapping[str, RoleForecast]
    phases: tuple[Phase, ...]
    prompt: int
    """tokens of a prompt"""
    completion: int
    """tokens of a completion"""
    device_bytes: int
    """memory of a device; 0 where it is not known"""
    rates: Mapping[str, Rates]
    """by the dtype of a forward pass; empty where they are not known"""
    notes: tuple[str, ...]
    """assumptions, and parts that are not counted"""

    @property
    def peak(self) -> int:
        """Most bytes of tensors on a device."""
        return max(phase.bytes for phase in self.phases)

    @property
    def usable(self) -> int:
        """Bytes of a device that tensors can take."""
        return int(self.device_bytes * (1 - self.options.reserve))

    @property
    def fits(self) -> bool | None:
        """Return True if the peak fits a device; None where its memory is not known."""
        return self.peak <= self.usable if self.device_bytes else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data; bytes and seconds."""
        return {**asdict(self), "peak": self.peak, "usable": self.usable, "fits": self.fits}


def forecast(config: RunConfig, options: PlanOptions) -> Forecast:
    """Return what the run of `config` needs on each of its devices.

    Raises:
        UsageError: the configuration cannot work on so many devices, or a model cannot be read.
    """
    plan, strategy = make_plan(config), config.providers["strategy"]
    if options.gpus % strategy.ranks_per_row:
        raise OptionError(
            "/plan.gpus",
            f"{options.gpus}: devices cannot form groups of {strategy.ranks_per_row} that share rows; pass a multiple of "
            f"{strategy.ranks_per_row}",
        )
    device = "cuda" if options.gpu or options.gpu_gib or torch.cuda.is_available() else "cpu"
    load = Workload.for_run(plan, options, options.gpus // strategy.ranks_per_row)
    passes = {name: _passes(plan, spec, load, device) for name, spec in plan.roles.items()}
    memory = {name: strategy.memory(each.memory, each.size, options.gpus) for name, each in passes.items()}
    device_bytes = _device_bytes(options)
    free = max(0, device_bytes - sum(each.resident for each in memory.values()))
    sampling = {
        name: replace(_sampling(load, each, free, device_bytes), gathered=memory[name].gathered)
        for name, each in passes.items()
    }
    rollout = config.providers.get("rollout")
    for name in plan.sources:
        if name != DATA and rollout is not None:
            asked = passes[name].size, sampling[name]
            memory[name] = replace(memory[name], cache=rollout.memory(*asked), kept=rollout.kept_memory(*asked))
    dtypes = {spec.options.compute_dtype: None for spec in plan.roles.values()}
    rates = {dtype: rates for dtype in dtypes if (rates := rates_of(options, dtype))}
    phases = _phases(plan, load, passes, memory, sampling, rates)
    return Forecast(
        options=options,
        roles={name: _role(spec, load, passes[name], memory[name]) for name, spec in plan.roles.items()},
        phases=phases,
        prompt=load.prompt,
        completion=load.completion,
        device_bytes=device_bytes,
        rates=rates,
        notes=tuple(_notes(plan, passes, load)),
    )


def _passes(plan: Plan, spec: RoleSpec, load: Workload, device: str) -> Passes:
    """Run the passes of a role on shapes."""
    narrow = plan.config.providers["strategy"].narrow and spec.trained
    train = load.training(spec) if spec.trained else None
    found = run_passes(spec, plan.config.chunk, train, load.reading(spec), device, narrow)
    if plan.base_owner(spec.name):
        return replace(found, size=replace(found.size, shares_base=True))
    return found


def _role(spec: RoleSpec, load: Workload, passes: Passes, memory: RoleMemory) -> RoleForecast:
    cells = load.training(spec) if spec.trained else load.reading(spec)
    return RoleForecast(spec.trained, memory, passes.size, passes.graph, cells.rows, cells.rounds)


def _sampling(load: Workload, passes: Passes, free: int, device_bytes: int) -> SamplingLoad:
    """Return what sampling a role takes on a device; its forward pass is scaled to the prompts alone."""
    prompts, n = load.prompts, load.plan.config.sampling.n
    spec_tokens = max(1, passes.read_tokens)
    prefill = passes.memory.inference * prompts * load.prompt // spec_tokens
    narrowed = passes.narrowed
    return SamplingLoad(prompts, n, load.prompt, load.completion, prefill, free, device_bytes, narrowed=narrowed)


def _phases(
    plan: Plan,
    load: Workload,
    passes: Mapping[str, Passes],
    memory: Mapping[str, RoleMemory],
    sampling: Mapping[str, SamplingLoad],
    rates: Mapping[str, Rates],
) -> tuple[Phase, ...]:
    """Return the phases of a step with the most bytes that all roles of a device hold in each.

    Ranks that share rows divide what a role computes on them, and each samples all of them.
    """
    together = plan.config.providers["strategy"].ranks_per_row
    resident = sum(each.resident + each.kept for each in memory.values())
    found = []
    for name in plan.sources:
        if name != DATA:
            rate = rates.get(plan.roles[name].options.compute_dtype)
            seconds = sampling_seconds(passes[name], sampling[name], rate) if rate else None
            found.append(Phase(f"sample {name}", resident + memory[name].cache - memory[name].kept, seconds))
    graphs = {name: passes[name].graph for name in plan.trained_roles if load.keeps_graph(plan.roles[name])}
    for name in plan.roles:
        if rows := load.forward_rows(name):
            operations = forward_operations(passes[name], rows, load.prompt, load.completion)
            held = max(memory[name].inference, graphs.get(name, 0))
            others = sum(graph for other, graph in graphs.items() if other != name)
            rate = rates.get(plan.roles[name].options.compute_dtype)
            seconds = operations / together / rate.operations if rate else None
            found.append(Phase(f"read {name}", resident + others + held, seconds))
    for number, name in enumerate(plan.trained_roles):
        waiting = sum(graphs.get(other, 0) for other in plan.trained_roles[number + 1 :])
        spec, steps = plan.roles[name], plan.config.update_epochs * plan.config.minibatches
        seconds = None
        if rate := rates.get(spec.options.compute_dtype):
            operations = forward_operations(passes[name], load.trained_rows(spec), load.prompt, load.completion)
            options = spec.options
            recomputes = isinstance(options, TrainedOptions) and options.gradient_checkpointing
            seconds = training_seconds(passes[name], operations / together, rate, recomputes)
            seconds += steps * update_seconds(memory[name], rate)
        found.append(Phase(f"train {name}", resident + waiting + memory[name].training, seconds))
    return tuple(found)


def _device_bytes(options: PlanOptions) -> int:
    """Return the memory of a device: stated, that of the named type, or that of a GPU in this machine."""
    if options.gpu_gib:
        return int(options.gpu_gib * GIB)
    if options.gpu:
        return int(GPUS[options.gpu].gib * GIB)
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def _notes(plan: Plan, passes: Mapping[str, Passes], load: Workload) -> list[str]:
    """Return what a reader must know of how the numbers were found."""
    notes = [f"{name}: {each.note}" for name, each in passes.items() if each.note]
    limits = {"prompt": (load.prompt, plan.config.max_prompt_tokens, "max_prompt_tokens")}
    if plan.online:
        limits["completion"] = (load.completion, plan.config.sampling.max_new_tokens, "sampling.max_new_tokens")
    for part, (tokens, most, option) in limits.items():
        if tokens > most:
            notes.append(f"no {part} of the run has {tokens} tokens: {option} is {most}")
    launcher = plan.config.providers.get("launcher")
    if launcher is not None and not launcher.one_process:
        notes.append(
            "the forecast assumes that all roles share each device; for roles on separate devices, read the lines "
            "of these roles"
        )
    return notes
