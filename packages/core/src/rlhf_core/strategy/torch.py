"""Plain PyTorch in one process, or replicated over the ranks of a process group with summed gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.contract.distributed import TorchWorld, World
from rlhf_core.contract.providers import Strategy
from rlhf_core.contract.roles import Trainable
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.strategy.parameter_states import WEIGHT, open_states, optimizer_states, parameter_names
from rlhf_core.strategy.shared_base import SharedBase
from rlhf_core.training.observation import ClippedClosure
from rlhf_core.training.optimizer import Schedule, load_optimizer, make_optimizer
from rlhf_core.util.tensor_tree import Copies, read_tree, write_tree

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.memory import ModelSize, RoleMemory
    from rlhf_core.contract.optimizers import OptimizerProvider, StepClosure

__all__ = ["TorchStrategy", "TorchTrainable"]

BUCKET_ELEMENTS = 2**25  # 128 MiB of float32 gradients a reduction: few calls, bounded extra memory


@dataclass(frozen=True)
class TorchStrategy(Strategy):
    """Float32 master weights, autocast to the role's dtype, gradients summed over ranks."""

    device: str = "auto"
    """device: `auto` takes the first CUDA device, or the CPU if there is none; or a torch device name"""

    second_order: ClassVar[bool] = True
    by_parameter: ClassVar[bool] = True

    def memory(self, whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
        """Return a whole copy on each device; over several, gradients are summed in buckets, each copied twice."""
        held = super().memory(whole, size, ranks)
        bucket = 8 * min(size.trained, BUCKET_ELEMENTS) if ranks > 1 else 0
        return replace(held, update=held.update + bucket)

    def __call__(
        self, build: Callable[[], nn.Module], optim: OptimizerProvider | None, total_steps: int
    ) -> TorchTrainable:
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return TorchTrainable(build().to(device), optim, total_steps, torch.device(device))


class TorchTrainable(Trainable):
    """A module, its optimizer and its schedule."""

    keeps_graphs = discards = True

    def __init__(
        self, module: nn.Module, optim: OptimizerProvider | None, total_steps: int, device: torch.device
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.world: World = TorchWorld() if distributed else World()
        self.module = module.eval()  # no dropout: stored and live log-probabilities must agree
        self.device = device
        self.options = optim
        self.steps_done = 0
        dtype: torch.dtype = module.compute_dtype  # type: ignore[assignment]
        self._autocast = dtype if dtype != torch.float32 and optim is not None else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=optim is not None and dtype == torch.float16)
        if self.scaler.is_enabled() and optim is not None and optim.closure:
            raise UsageError(
                f"the optimizer {type(optim).__name__} evaluates the loss several times per step, which float16 "
                "does not support; use dtype bfloat16 or float32"
            )
        self.optimizer = make_optimizer(module, optim, total_steps) if optim is not None else None
        self.schedule = Schedule(self.optimizer, optim, total_steps) if optim is not None else None
        self._copies = Copies()

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        from rlhf_core.models.inputs.arrange import arrange_inputs

        with torch.autocast(self.device.type, self._autocast) if self._autocast else contextlib.nullcontext():
            outputs: dict[str, Tensor] = self.module(arrange_inputs(batch).to(self.device), names)
        return outputs

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss.to(self.device)).backward()  # the scale lives where the weights do

    def step(self, closure: StepClosure | None = None) -> dict[str, float]:
        assert self.optimizer is not None and self.schedule is not None, "a frozen role is not stepped"
        lr = self.schedule.lr(self.steps_done)
        norm = self._reduce()
        if self.scaler.is_enabled() or norm.isfinite():  # never into the weights; a scaler looks for itself
            self.schedule.set(self.steps_done)
            if closure is None:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step(ClippedClosure(closure, self._reduce))
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += int(norm.isfinite())  # the schedule follows the steps that were taken
        return {"grad_norm": float(norm), "lr": lr, **scale}

    def _reduce(self) -> Tensor:
        """Sum the gradients over ranks and clip them; returns their norm before."""
        assert self.optimizer is not None and self.options is not None, "a frozen role is not stepped"
        self._sum_gradients()  # before the scaler looks for overflow, so that all ranks see it and skip the step together
        self.scaler.unscale_(self.optimizer)
        limit = self.options.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self._trained_parameters(), limit)

    def discard(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _sum_gradients(self) -> None:
        """Add the ranks' gradients, in buckets: a call per bucket, not per parameter."""
        for parameter in self._trained_parameters():
            if parameter.grad is None:  # another rank may have used it; and momentum moves it on one rank as on many
                parameter.grad = torch.zeros_like(parameter)
        if self.world.size == 1:
            return
        grads = [p.grad for p in self._trained_parameters() if p.grad is not None]
        for bucket in _buckets(grads):
            flat = self.world.sum(torch.cat([g.reshape(-1) for g in bucket]))
            for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(part.view_as(grad))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.hf_weights()  # type: ignore[operator]

    def gathered(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def shared_base(self) -> SharedBase:
        """The model without its adapters, as a frozen role's."""
        return SharedBase(self)

    # ------------------------------------------------------------------------------------------------------------------
    # checkpoints

    def save(self, folder: str) -> None:
        if self.optimizer is not None and self.world.rank == 0:  # a frozen role is loaded again from where it came
            _write(self._state(), folder)

    def snapshot(self) -> Callable[[str], None]:
        if self.optimizer is None or self.world.rank > 0:
            return partial(_write, {})
        return partial(_write, self._copies.copy(self._state()))

    def load(self, folder: str) -> None:
        if self.optimizer is None:
            return
        if not (Path(folder) / "module.safetensors").exists():
            self._load_pieces(folder)
            return
        state = {name: read_tree(Path(folder) / f"{name}.safetensors") for name in ("module", "optimizer")}
        self.module.load_state_dict(state["module"])
        load_optimizer(self.optimizer, state["optimizer"]["optimizer"])
        self.scaler.load_state_dict(state["optimizer"]["scaler"])
        self.steps_done = state["optimizer"]["steps_done"]

    def _load_pieces(self, folder: str) -> None:
        """Restore what a strategy that shards wrote."""
        assert self.optimizer is not None
        names = parameter_names(self.module, self.optimizer)
        states = open_states(folder, names)
        state = self.module.state_dict()
        with torch.no_grad():
            for name, tensor in chain(self.module.named_parameters(), self.module.named_buffers()):
                if name in state:
                    tensor.copy_(states.read(name, WEIGHT, 0, tensor.numel()).view_as(tensor))
        shapes = {name: state[name].shape for name in names}
        groups = self.optimizer.state_dict()["param_groups"]
        load_optimizer(self.optimizer, {"state": optimizer_states(states, shapes), "param_groups": groups})
        self.steps_done = states.steps_done
        if states.scale is not None and self.scaler.is_enabled():
            scale, clean = states.scale
            age = clean % self.scaler.get_growth_interval()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": age})

    def _state(self) -> dict[str, Any]:
        """Everything a checkpoint holds of this role, by the name of the file it is written to."""
        assert self.optimizer is not None
        optimizer = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps_done": self.steps_done,
        }
        return {"module": self.module.state_dict(), "optimizer": optimizer}

    @property
    def held_bytes(self) -> int:
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return super().held_bytes + sum(each.numel() * each.element_size() for each in tensors)

    def offload(self) -> None:
        self._move("cpu")

    def reload(self) -> None:
        self._move(self.device)

    def _move(self, device: str | torch.device) -> None:
        self.module.to(device)
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        state[name] = value.to(device)


def _write(state: dict[str, Any], folder: str) -> None:
    """Write each tree of `state` to a file of its name."""
    for name, tree in state.items():
        write_tree(Path(folder) / f"{name}.safetensors", tree)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in runs of about `BUCKET_ELEMENTS`."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
