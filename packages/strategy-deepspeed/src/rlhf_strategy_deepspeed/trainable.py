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
from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.lazy import torch
from rlhf_core.strategy.parameter_states import Scale, open_states, parameter_names, write_pieces
from rlhf_core.training.optimizer import Schedule, make_optimizer
from rlhf_strategy_deepspeed.compiled_adam import compiled_adam
from rlhf_strategy_deepspeed.config import configuration
from rlhf_strategy_deepspeed.engine import (
    assign,
    clear_gradients,
    forward,
    gather_weights,
    initialize,
    join_shares,
    library,
    mark_leaves,
    select_ranks,
    shard,
    show,
    whole,
    whole_weights,
)
from rlhf_strategy_deepspeed.parking import Parking
from rlhf_strategy_deepspeed.pieces import rank_pieces, read_states
from rlhf_strategy_deepspeed.releasing import releasing_weights
from rlhf_strategy_deepspeed.sequence import join_rows
from rlhf_strategy_deepspeed.tensor import cut_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.optimizers import OptimizerProvider
    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["DeepSpeedTrainable"]


class DeepSpeedTrainable(Trainable):
    """A module, its optimizer and its schedule, sharded according to `options.stage`."""

    def __init__(
        self,
        options: DeepSpeedOptions,
        module: nn.Module,
        optim: OptimizerProvider,
        total_steps: int,
        device: torch.device,
    ) -> None:
        dtype = str(module.compute_dtype).removeprefix("torch.")
        _check_choices(options, dtype, optim)
        self.ranks = TorchWorld()
        self.shards = cut_layers(module, options.tensor) if options.tensor > 1 else None
        self.world: World = self.shards.world if self.shards is not None else join_rows(module, options)
        if options.hpz is not None and self.ranks.size % options.hpz:
            raise OptionError(
                "hpz", f"{options.hpz} does not divide the {self.ranks.size} ranks; choose a number that does"
            )
        config = configuration(options, dtype, optim)
        if options.show_config:
            show("a trained role", config)
        self.bucket = config["zero_optimization"]["reduce_bucket_size"]
        self.options = optim
        self.stage = options.stage
        self.sharded = options.stage == 3 or self.shards is not None
        self.steps_done = 0
        self.device = device
        module.eval()  # no dropout: stored and live log-probabilities must agree
        optimizer = make_optimizer(
            module, optim, total_steps
        )  # before sharding: afterwards a matrix looks like a vector
        self._names = parameter_names(module, optimizer)
        if options.cpu_adam:
            optimizer = compiled_adam(optimizer)
        self._norm: float | Tensor = 0.0
        if self.stage == 0:
            optimizer.register_step_pre_hook(self._clip)
        elif self.stage == 3:
            mark_leaves(module, options.leaf_modules)
            shard(module, config, device)
        self.engine = initialize(module, config, optimizer, self.shards.ranks if self.shards is not None else None)
        self.scaler = self.engine.optimizer.loss_scaler if dtype == "float16" else None
        if self.scaler is not None:
            self.scaler.raise_error_at_min_scale = False  # the run itself stops where a scale of 1 overflows
        self.parking = Parking(self.engine, device)
        self.schedule = Schedule(self.engine.optimizer, optim, total_steps)
        self.module: nn.Module = self.engine.module

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        with self._pass():
            return forward(self.engine, batch, names, self.device)

    def backward(self, loss: Tensor) -> None:
        ranks = self.world if self.shards is not None else self.ranks
        select_ranks(self.engine)
        with self._pass():
            self.engine.backward(loss.to(self.device) * ranks.size)  # DeepSpeed takes the mean over ranks

    def _pass(self) -> AbstractContextManager[None]:
        """Return the context of a forward or backward pass."""
        return releasing_weights() if self.stage == 3 else nullcontext()

    def step(self) -> dict[str, float]:
        lr = self.schedule.set(self.steps_done)
        scale = {"loss_scale": float(self.scaler.cur_scale)} if self.scaler is not None else {}
        select_ranks(self.engine)
        self.engine.step()
        clear_gradients(self.engine, self.stage)
        norm = float(self._norm if self.stage == 0 else self.engine.get_global_grad_norm())
        if getattr(self.engine.optimizer, "overflow", False) or norm < 0:  # its mark of a step that it did not take
            norm = float("inf")
        self.steps_done += int(isfinite(norm))  # the schedule follows the steps that were taken
        return {"grad_norm": norm, "lr": lr, **scale}

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the reduced gradients and keep their norm, which DeepSpeed does not report; nothing that is not finite
        gets into the weights."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = self.options.max_grad_norm or float("inf")
        if self.shards is not None:
            self._norm = self.shards.clip(parameters, limit)
        else:
            self._norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not self._norm.isfinite():
            for parameter in parameters:
                parameter.grad = None

    def full(self, parameter: Tensor) -> Tensor:
        if self.shards is not None:
            return self.shards.full(parameter)
        return whole(parameter) if self.sharded else parameter.detach()

    def own_share(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor.detach().view(-1) if self.stage == 3 else parameter.detach()  # type: ignore[no-any-return]

    def join_shares(self, parameter: Tensor, share: Tensor) -> Tensor:
        if self.shards is not None:
            return self.shards.join(parameter, share)
        return join_shares(parameter, share, self.device) if self.sharded else share

    def assign(self, parameter: Tensor, whole: Tensor) -> None:
        assign(parameter, whole if self.shards is None else self.shards.part(parameter, whole))

    def gathered(self) -> AbstractContextManager[None]:
        if self.shards is not None:
            return self.shards.gathered()
        return gather_weights(self.engine) if self.sharded else nullcontext()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 3:
            yield from whole_weights(self.module, self.bucket)
        else:
            yield from self.module.hf_weights(self.full)  # type: ignore[operator]

    # ------------------------------------------------------------------------------------------------------------------
    # checkpoints

    def save(self, folder: str) -> None:
        pieces = rank_pieces(self.engine, self.stage, self.shards)
        scale = _scale(self.scaler) if self.scaler is not None and self.scaler.dynamic else None
        write_pieces(folder, self.ranks.rank, self.ranks.size, self.steps_done, pieces, scale)

    def load(self, folder: str) -> None:
        states = open_states(folder, self._names)
        read_states(self.engine, self.stage, states, self.shards)
        self.steps_done = states.steps_done
        if states.scale is not None and self.scaler is not None and self.scaler.dynamic:
            self.scaler.cur_scale, self.scaler.cur_iter = states.scale
            self.scaler.last_overflow_iter = -1

    # ------------------------------------------------------------------------------------------------------------------
    # sleeping

    def offload(self) -> None:
        """Move all states to main memory."""
        self.parking.leave()

    def reload(self) -> None:
        """Bring them back."""
        self.parking.come_back()


def _scale(scaler: Any) -> Scale:
    """Return the loss scale of DeepSpeed's scaler, and the steps since the last overflow."""
    return scaler.cur_scale, scaler.cur_iter - scaler.last_overflow_iter - 1


def _check_choices(options: DeepSpeedOptions, dtype: str, optim: OptimizerProvider) -> None:
    """Refuse what does not go together.

    Raises:
        UsageError: naming the choice to change.
    """
    if dtype == "float16" and options.stage == 0:
        raise UsageError(
            f"strategy 'deepspeed' cannot train in float16 at stage 0; use {option('stage')} 1, 2 or 3, or the "
            "strategy torch"
        )
    if dtype == "float16" and not library().accelerator.get_accelerator().is_fp16_supported():
        raise UsageError("DeepSpeed does not compute in float16 on this device; use dtype bfloat16 or float32")
    if options.stage > 0 and not optim.elementwise:
        raise UsageError(
            f"strategy 'deepspeed' cuts matrices into flat shards at stage {options.stage}, but the optimizer "
            f"{type(optim).__name__} needs whole matrices; use {option('stage')} 0, the strategy torch, or the "
            "optimizer adamw"
        )
    if options.tensor > 1 and not optim.elementwise:
        raise OptionError(
            "tensor",
            f"{options.tensor} cuts matrices, but the optimizer {type(optim).__name__} needs whole ones; use the optimizer "
            "adamw, or leave it out",
        )
