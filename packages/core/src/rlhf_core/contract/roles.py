"""Roles: named models with a purpose, the models under a strategy inside them, and where a launcher placed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.optimizers import StepClosure
    from rlhf_core.contract.plan import RoleSpec
    from rlhf_core.contract.providers import Rollout

__all__ = ["Placement", "Role", "SecondOrderTrainable", "Trainable"]

T = TypeVar("T")


class Trainable:
    """A model under a strategy, inside one process (one rank of `world`).

    Strategies subclass it. `sharded`, `full`, `own_share`, `join_shares`, `assign` and what options ask for (`shared_base`,
    `snapshot`, `discard`) have defaults.

    `module` is the `RoleModule` that `build` made, or one with its attributes `adapters`, `average`, `frozen`, `packs`
    and `vision`.
    """

    world: World
    module: nn.Module
    sharded: bool = False
    """True if a rank may hold a share of a parameter only, so that whole ones come from `full` and all ranks work together"""
    discards: bool = False
    """True if `discard` works and `step` leaves weights, optimizer and schedule alone where the gradient is not finite"""
    keeps_graphs: bool = False
    """True if the graph of a forward pass stays usable while further passes are made, until the next step"""

    def full(self, parameter: Tensor) -> Tensor:
        """Return the whole of a parameter of `module`, or of a tensor sharded like one, without gradient.

        It is valid until the next call. Collective: every rank calls it for the same parameters in the same order.
        """
        return parameter.detach()

    def own_share(self, parameter: Tensor) -> Tensor:
        """Return this rank's share of a parameter of `module`, with the numbers that it has now, without gradient.

        Its shape stays the same from step to step.
        """
        return parameter.detach()

    def join_shares(self, parameter: Tensor, share: Tensor) -> Tensor:
        """Return the whole of a tensor, in the shape of `parameter`, of which this rank has `share`, cut as `own_share` cuts.

        It is valid until the next call. Collective, like `full`.
        """
        return self.full(share)

    def assign(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole tensor into a parameter or buffer of `module`; where it is sharded, this rank's share of it.

        Collective, like `full`.
        """
        parameter.data.copy_(whole)

    def differentiable(self) -> AbstractContextManager[Sequence[Tensor]]:
        """While it is open, `forward` may be differentiated twice with respect to the tensors that it gives.

        They are the whole trained parameters, in the order of `module`'s. Nothing is reduced over ranks meanwhile. A strategy
        with `second_order` that shards overrides it.
        """
        return nullcontext([parameter for parameter in self.module.parameters() if parameter.requires_grad])

    def shared_base(self) -> Trainable | None:
        """Return the model without its adapters, as a frozen role (`SharedBase`); None: that role loads the model again."""
        return None

    def snapshot(self) -> Callable[[str], None] | None:
        """Copy what `save` would write, and return what writes the copy to a folder (`--save-async`); None saves in the loop.

        Every rank takes the snapshot. Only the first writes it, in another thread while training continues, and before the next
        snapshot is taken.
        """
        return None

    def discard(self) -> None:
        """Forget the gradients since the last step (`--on-nonfinite skip`, `--on-oom halve`), where `discards` is true."""
        raise AssertionError("`discards` is false: this strategy takes no step back")

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """The wanted outputs for the rows of `batch`, with gradient unless called under `torch.no_grad`."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`. Gradients are summed over micro-batches and over the ranks of `world`."""
        raise NotImplementedError

    def step(self) -> Mapping[str, float]:
        """Clip, update, zero the gradients, advance the schedule; returns `grad_norm` and `lr`.

        The norm is that of the gradients summed over ranks, so it is finite on every rank or on none. A gradient that is not
        finite must not reach the weights: its norm is returned, and the run stops unless the role computes in float16, whose
        loss scaling overflows now and then and adapts.
        """
        raise NotImplementedError

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names, gathered if sharded."""
        raise NotImplementedError

    def gathered(self) -> AbstractContextManager[None]:
        """While it is open, `module` holds full weights and each rank may use it independently. Calls nest."""
        raise NotImplementedError

    def save(self, folder: str) -> None:
        """Write model, optimizer and schedule state for `load`; every rank calls it."""
        raise NotImplementedError

    def load(self, folder: str) -> None:
        """Restore what `save` wrote."""
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        """Bytes of the states that `offload` moves; by default what `module` holds, and its gradients."""
        parameters = list(self.module.parameters())
        gradients = [each.grad for each in parameters if each.grad is not None]
        tensors = (*parameters, *gradients, *self.module.buffers())
        return sum(each.numel() * each.element_size() for each in tensors)

    def offload(self) -> None:
        """Move all states out of device memory until `reload`."""
        raise NotImplementedError

    def reload(self) -> None:
        """Bring them back."""
        raise NotImplementedError


class SecondOrderTrainable(Trainable):
    """`Trainable` of a strategy with `second_order`: its optimizer may read several gradients per step."""

    optimizer: Any
    """the torch optimizer"""

    def step(self, closure: StepClosure | None = None) -> Mapping[str, float]:
        """The step of a `Trainable`; with `closure`, the optimizer gets one.

        Each call of `closure` after the first evaluates loss and gradients anew, which are then summed and clipped as those
        at hand were.
        """
        raise NotImplementedError


class Role:
    """A named model with a purpose: what the loop and the rollout engines see, local or remote."""

    name: str
    spec: RoleSpec
    version: int
    """optimizer steps so far"""

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the role's model."""
        raise NotImplementedError

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, Tensor]:
        """Return the outputs `names` of all rows: eval mode, no gradient, on the CPU.

        `source` names where the batch came from if the role is about to be trained on it. A role may then keep the pass for
        training.
        """
        raise NotImplementedError

    def train(self, work: Mapping[str, Batch]) -> dict[str, float]:
        """One pass of optimizer steps over the credited batches, keyed as `Plan.credits`; returns metrics."""
        raise NotImplementedError

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names."""
        raise NotImplementedError

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return what `weights` does, without the role's adapters."""
        return self.weights()

    def save_adapters(self, folder: str) -> bool:
        """Write the role's adapters to a folder as PEFT reads them; return False where this process has none.

        Every rank calls it, and writes its own folder.
        """
        return False

    def refresh(self, change: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
        """Take weights that arrived during a call of the engine into the role's module; return the version it holds now.

        Engines that sample from the module itself call it before each forward pass. The module changes inside of `change()`,
        which is entered only if there is something to take. By default nothing arrives.
        """
        return self.version

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], decay: float = 0.0) -> None:
        """Take the weights that another role's `weights` yields: decay * own + (1 - decay) * those; a copy with decay 0.

        Every rank calls it. It is for roles that no term trains here, since no optimizer follows the change.

        Raises:
            UsageError: names or shapes are not those of this role's model.
        """
        raise NotImplementedError

    def save(self, folder: str) -> None:
        """Checkpoint state."""
        raise NotImplementedError

    def snapshot(self) -> Callable[[str], None] | None:
        """Copy the checkpoint state, and return what writes the copy to a folder; None: it can only be saved."""
        return None

    def load(self, folder: str) -> None:
        """Restore checkpoint state."""
        raise NotImplementedError

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder."""
        raise NotImplementedError

    def sleep(self) -> int:
        """Give device memory back until `wake`; return its bytes, the most of any rank. Nothing else is called between."""
        return 0

    def wake(self) -> int:
        """Take the memory again, with the states as they were; return its bytes."""
        return 0


@dataclass
class Placement:
    """Roles and rollout engine of a run, wherever they run. Launchers return it.

    `rollout` is the provider, which core opens and closes, or an object of that kind that stands for engines elsewhere.
    """

    roles: dict[str, Role]
    rollout: Rollout | None
    world: World
    retries: int = 0
    """deaths of processes (`WorkerLost`) that the run survives, with the roles that `revive` restores"""
    snapshot_every: int = 0
    """steps between two calls of `keep`; 0 makes none"""

    def keep(self, step: int, roles: Sequence[str]) -> bool:
        """Copy the state of these roles, as `Role.save` would write it, to where a death leaves it; True if that worked.

        The copy of an earlier step stays until this one is whole.
        """
        raise NotImplementedError

    def give_back(self, step: int, roles: Sequence[str]) -> None:
        """Restore the state of these roles that was kept after `step`.

        Raises:
            WorkerLost: it is lost, too.
        """
        raise NotImplementedError

    def recoveries(self) -> Mapping[str, float]:
        """Return metrics of processes that were replaced since the last call, without the run's help. Called once per step."""
        return {}

    def revive(self, roles: Sequence[str]) -> None:
        """Start these roles anew, and other dead ones, in their old places or where there is room now.

        Raises:
            RunStopped: there is no room for them.
        """
        raise NotImplementedError

    def metrics(self) -> Mapping[str, float]:
        """Return what the launcher counted since it was last asked, sums over a step by name; by default nothing."""
        return {}

    def together(self, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Make a call to each of some roles, by the role's name, none of which depends on another; return their results.

        By default one after the other, in order. A launcher whose roles have separate devices makes them at once.
        """
        return {name: call() for name, call in calls.items()}

    def close(self) -> None:
        """Free what the launcher holds, after everything else; by default nothing."""
