"""A trained role in a DeepSpeed engine: the contract of `Trainable` on top of ZeRO 0 to 3.

Core wants gradients summed over micro-batches and ranks, in any number of `backward` calls before a `step`. DeepSpeed
means over ranks, which the factor in `backward` undoes, and counts micro-batches, which `managed_gradient_accumulation`
off stops. Learning rates come from core's schedule, so that every strategy walks the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.distributed import TorchWorld, World
from rlhf_core.contract.roles import Trainable
from rlhf_core.errors import UsageError, option
from rlhf_core.lazy import torch
from rlhf_core.strategy.parameter_states import open_states, parameter_names, write_pieces
from rlhf_core.training.optimizer import Schedule, make_optimizer
from rlhf_strategy_deepspeed.config import configuration
from rlhf_strategy_deepspeed.engine import (
    assign,
    forward,
    gather_weights,
    initialize,
    shard,
    show,
    whole,
    whole_weights,
)
from rlhf_strategy_deepspeed.pieces import rank_pieces, read_states

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.optimizers import OptimizerProvider
    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["DeepSpeedTrainable"]


class DeepSpeedTrainable(Trainable):
    """A module, its optimiser and its schedule, sharded as `options.stage` says."""

    def __init__(
        self,
        options: DeepSpeedOptions,
        module: nn.Module,
        optim: OptimizerProvider,
        total_steps: int,
        device: torch.device,
    ) -> None:
        dtype = str(module.compute_dtype).removeprefix("torch.")
        if dtype == "float16":
            raise UsageError("strategy 'deepspeed' does not train in float16 in this version; use bfloat16 or float32")
        if options.stage > 0 and not optim.elementwise:
            raise UsageError(
                f"strategy 'deepspeed' cuts matrices into flat shards at stage {options.stage}, and the optimizer "
                f"{type(optim).__name__} reads whole ones; use {option('stage')} 0, the strategy torch, or the "
                "optimizer adamw"
            )
        config = configuration(options, dtype, optim)
        if options.show_config:
            show("a trained role", config)
        self.world: World = TorchWorld()
        self.bucket = config["zero_optimization"]["reduce_bucket_size"]
        self.options = optim
        self.stage = options.stage
        self.sharded = options.stage == 3
        self.steps_done = 0
        self.device = device
        module.eval()  # no dropout: stored and live log-probabilities must agree
        optimizer = make_optimizer(
            module, optim, total_steps
        )  # before sharding: afterwards a matrix looks like a vector
        self._names = parameter_names(module, optimizer)
        self._norm: float | Tensor = 0.0
        if self.stage == 0:
            optimizer.register_step_pre_hook(self._clip)
        elif self.stage == 3:
            shard(module, config, device)
        self.engine = initialize(module, config, optimizer)
        self.schedule = Schedule(self.engine.optimizer, optim, total_steps)
        self.module: nn.Module = self.engine.module

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        return forward(self.engine, batch, names, self.device)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss.to(self.device) * self.world.size)  # DeepSpeed takes the mean over ranks

    def step(self) -> dict[str, float]:
        lr = self.schedule.set(self.steps_done)
        self.engine.step()
        if self.stage == 3:  # else a weight that the next step leaves out (an expert nobody asked) keeps this gradient
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        norm = float(self._norm if self.stage == 0 else self.engine.get_global_grad_norm())
        if getattr(self.engine.optimizer, "overflow", False) or norm < 0:  # what it says of a step that it did not take
            norm = float("inf")
        self.steps_done += int(isfinite(norm))  # the schedule follows the steps that were taken
        return {"grad_norm": norm, "lr": lr}

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the reduced gradients and keep their norm, which DeepSpeed would not tell; nothing that is not finite gets into
        the weights."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm or float("inf"))
        if not self._norm.isfinite():
            for parameter in parameters:
                parameter.grad = None

    def full(self, parameter: Tensor) -> Tensor:
        return whole(parameter) if self.sharded else parameter.detach()

    def assign(self, parameter: Tensor, whole: Tensor) -> None:
        assign(parameter, whole)

    def gathered(self) -> AbstractContextManager[None]:
        return gather_weights(self.engine) if self.stage == 3 else nullcontext()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 3:
            yield from whole_weights(self.module, self.bucket)
        else:
            yield from self.module.hf_weights()  # type: ignore[operator]

    # ------------------------------------------------------------------------------------------------------------------
    # checkpoints

    def save(self, folder: str) -> None:
        pieces = rank_pieces(self.engine, self.stage)
        write_pieces(folder, self.world.rank, self.world.size, self.steps_done, pieces)

    def load(self, folder: str) -> None:
        states = open_states(folder, self._names)
        read_states(self.engine, self.stage, states)
        self.steps_done = states.steps_done

    # ------------------------------------------------------------------------------------------------------------------
    # sleeping

    def offload(self) -> None:
        """All states to host memory. Under stage 1 in bfloat16 they stay: DeepSpeed's optimiser there cannot move them."""
        cpu = torch.device("cpu")
        if self.stage == 0:
            self.module.to(cpu)
            self._move_moments(cpu)
        elif self.stage == 3:
            self.engine.offload_states(include=self._gradients(), pin_memory=self._pins)
            self._offload_shards()
            self._move_masters(cpu)
            self._move_moments(cpu)
            self._move_frozen(cpu)
        elif hasattr(self.engine.optimizer, "offload_states"):
            self.engine.offload_states(pin_memory=self._pins)
            self._move_frozen(cpu)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """And back."""
        if self.stage == 0:
            self.module.to(self.device)
            self._move_moments(self.device)
        elif self.stage == 3:
            self.engine.reload_states()
            self._move_masters(self.device)
            self._move_moments(self.device)
            self._move_frozen(self.device)
        elif hasattr(self.engine.optimizer, "reload_states"):
            self.engine.reload_states()
            self._move_frozen(self.device)

    @property
    def _pins(self) -> bool:
        return self.device.type != "cpu"

    def _gradients(self) -> set[Any]:
        """What DeepSpeed's stage 3 moves itself; the rest it moves for its own fused optimiser, or where all is trained."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        return {State.lp_grads, State.contiguous_grad_buffer}

    def _offload_shards(self) -> None:
        """Stage 3: this rank's shards of what is trained. As in DeepSpeed, which takes all parameters for trained ones; it
        brings them back."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State
        from deepspeed.runtime.zero.stage3 import get_mapping_to_flat_buffer

        sharded = self.engine.optimizer
        sharded.lp_param_buffer.data = sharded.lp_param_buffer.cpu()
        for shard_, offset, length in get_mapping_to_flat_buffer(sharded._get_parameter_partitions()):
            shard_.data = sharded.lp_param_buffer.narrow(0, offset, length)
        sharded.fp16_partitioned_groups_flat.clear()
        sharded.offloaded_states.add(State.lp_params)

    def _move_frozen(self, device: torch.device) -> None:
        """What DeepSpeed knows no state of: parameters that are not trained, under stage 3 their shards, and buffers."""
        for parameter in self.module.parameters():
            if not parameter.requires_grad:
                held = getattr(parameter, "ds_tensor", parameter)
                held.data = held.data.to(device)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(device)

    def _move_masters(self, device: torch.device) -> None:
        """Stage 3: this rank's shards of the float32 weights."""
        for shards in self.engine.optimizer.fp32_partitioned_groups_flat:
            shards.data = shards.data.to(device)

    def _move_moments(self, device: torch.device) -> None:
        """What AdamW remembers, in torch's own optimiser, around which stage 3 puts its."""
        optimizer = self.engine.optimizer
        for state in getattr(optimizer, "optimizer", optimizer).state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.to(device)
