"""The strategy `fsdp2`: weights, gradients and optimizer states sharded over the ranks by PyTorch's FSDP2.

Each layer is a unit of `torch.distributed.fsdp.fully_shard`; embeddings and language-model head are in the root unit. A unit
gathers its weights before it runs and frees them after (Zhao et al. 2023).

Left out on purpose: 4-bit weights, float16, asynchronous checkpoints, images on several ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core import (
    ClippedClosure,
    Schedule,
    SecondOrderTrainable,
    SharedBase,
    Strategy,
    TorchWorld,
    Trainable,
    UsageError,
    World,
    make_optimizer,
)
from rlhf_core.lazy import torch
from rlhf_strategy_fsdp2.memory import sharded_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core import Batch, ModelSize, OptimizerProvider, RoleMemory, RoleModule, StepClosure


@dataclass(frozen=True)
class FSDP2(Strategy):
    """PyTorch FSDP2: weights, gradients and optimizer states sharded over ranks (Zhao et al. 2023)."""

    reshard: bool = True
    """free a layer's weights between forward and backward pass; False keeps them, which needs more memory and less traffic"""

    second_order: ClassVar[bool] = True
    narrow: ClassVar[bool] = True

    def memory(self, whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
        """Return the share of a rank, and what it gathers while units run."""
        return sharded_memory(whole, size, ranks, self.reshard)

    def __call__(self, build: Callable[[], RoleModule], optim: OptimizerProvider | None, total_steps: int) -> Trainable:
        if not torch.distributed.is_initialized():  # one process: a group in memory needs no port
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        return FSDP2Trainable(build().eval(), optim, total_steps, self.reshard)


class FSDP2Trainable(SecondOrderTrainable):
    """A sharded module, its optimizer and its schedule."""

    sharded = discards = True

    def __init__(self, module: RoleModule, optim: OptimizerProvider | None, total_steps: int, reshard: bool) -> None:
        if optim is not None and module.compute_dtype == torch.float16:
            raise UsageError("strategy 'fsdp2' does not train in float16: use bfloat16 or float32")
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise UsageError("strategy 'fsdp2' shards no 4-bit weights: leave out quantize, or use strategy 'torch'")
        self.world: World = TorchWorld()
        self.device = torch.device(*(("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else ("cpu",)))
        self.module, self.reshard = module, reshard
        self.units = _shard(module, self.device.type, self.world.size, reshard)
        self.options, self.steps_done = optim, 0
        self.optimizer = make_optimizer(module, optim, total_steps) if optim is not None else None
        self.schedule = Schedule(self.optimizer, optim, total_steps) if optim is not None else None
        self._gathered = 0

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        from rlhf_core import arrange_inputs

        if any(batch.images) and self.world.size > 1:
            raise UsageError("strategy 'fsdp2' takes images in one process only: use strategy 'torch', or one rank")
        differentiate = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiate):  # gathered weights may be trained
            outputs: dict[str, Tensor] = self.module(arrange_inputs(batch).to(self.device), names)
        if not differentiate:
            self._free()
        return outputs

    def _free(self) -> None:
        for unit in self.units if not self._gathered else ():
            unit.reshard()

    def backward(self, loss: Tensor) -> None:
        loss.to(self.device).backward()

    def step(self, closure: StepClosure | None = None) -> dict[str, float]:
        lr = self.schedule.set(self.steps_done)
        norm = self._clip()
        if norm.isfinite():
            self.optimizer.step(ClippedClosure(closure, self._clip) if closure is not None else None)
            self.steps_done += 1  # the schedule follows the steps that were taken
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": float(norm), "lr": lr}

    def _clip(self) -> Tensor:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # momentum moves it all the same, as under strategy `torch`
                parameter.grad = torch.zeros_like(parameter)
        return self.full(torch.nn.utils.clip_grad_norm_(trained, self.options.max_grad_norm or float("inf")))

    @contextmanager
    def differentiable(self) -> Iterator[list[Tensor]]:
        with self.gathered():  # a graph of gradients needs the weights of all layers until its end
            self.module.set_requires_gradient_sync(False)
            for unit in self.units:
                unit.set_reshard_after_backward(False, recurse=False)
            try:
                yield [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            finally:
                self.module.set_requires_gradient_sync(True)
                for unit in self.units:
                    unit.set_reshard_after_backward(True, recurse=False)

    def discard(self) -> None:
        self.units[-1].reset_iter_state()
        self.module.zero_grad(set_to_none=True)

    def full(self, parameter: Tensor) -> Tensor:
        with torch.no_grad():
            return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()

    def assign(self, parameter: Tensor, whole: Tensor) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):  # every rank has the whole and takes its own share
            mesh, whole = parameter.device_mesh, whole.to(self.device, parameter.dtype)
            whole = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
        parameter.data.copy_(whole)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.hf_weights(self.full)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if not self._gathered:
            with torch.inference_mode(False), torch.no_grad():
                for unit in self.units:
                    unit.set_reshard_after_forward(False, recurse=False)
                    unit.unshard()
        self._gathered += 1
        try:
            yield
        finally:
            self._gathered -= 1
            self._free()
            for unit in self.units[:-1] if not self._gathered else ():
                unit.set_reshard_after_forward(self.reshard, recurse=False)

    def shared_base(self) -> SharedBase:
        return SharedBase(self)

    def save(self, folder: str) -> None:
        from torch.distributed import checkpoint

        if self.optimizer is not None:  # a frozen role is loaded again from where it came
            checkpoint.save(self._state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        if self.optimizer is not None:
            state = self._state()
            torch.distributed.checkpoint.load(state, checkpoint_id=folder)
            self.module.load_state_dict(state["module"])
            set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
            self.steps_done = state["steps_done"]

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, by name: each rank writes and reads its share, whatever the number of ranks."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        optimizer = get_optimizer_state_dict(self.module, self.optimizer)
        return {"module": self.module.state_dict(), "optimizer": optimizer, "steps_done": self.steps_done}

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def reload(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.module.to(device)
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            state.update({name: value.to(device) for name, value in state.items() if isinstance(value, torch.Tensor)})


def _shard(module: RoleModule, device: str, ranks: int, reshard: bool) -> list[Any]:
    """Shard `module` in place; return its units, the root last."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes outputs in place
    mesh = init_device_mesh(device, (ranks,))
    policy = MixedPrecisionPolicy(module.compute_dtype, torch.float32, cast_forward_inputs=False)
    units: list[Any] = [fully_shard(head, mesh=mesh) for head in module.scalar_heads()]  # they compute in float32
    options: Any = {"mesh": mesh, "mp_policy": policy}
    units += [fully_shard(layer, reshard_after_forward=reshard, **options) for layer in _layers(module.model)]
    units.append(fully_shard(module, reshard_after_forward=False, **options))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)  # core has divided; gradients are summed
        unit.set_force_sum_reduction_for_comms(True)
    module.set_reduce_scatter_unused_params(True)  # ranks may use different experts
    register_fsdp_forward_method(module, "states_of")  # what another role's comparison calls
    module.begin = lambda: None
    register_fsdp_forward_method(module, "begin")
    module.begin()  # the first pass decides which unit is the root, and a sampler begins with a layer
    module.reshard()
    return units


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists of modules: a transformer's layers, not the experts inside them."""
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _layers(child)
