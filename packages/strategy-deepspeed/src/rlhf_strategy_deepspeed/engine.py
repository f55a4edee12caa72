"""A DeepSpeed engine around a module, and what its stage 3 makes hard: reading weights, and using the module without the
engine.

Under stage 3 a parameter holds nothing except while its module runs: hooks on every module gather its weights before and
release them after. Code that calls modules in its own order (a sampler, whose ranks stop at different lengths) must
not trigger those collective calls: `gathered` holds all weights and takes the hooks away for as long as it is open.

No rank builds the whole module: its weights are deferred (`rlhf_core.models.loading.deferral`), and `shard` reads and cuts one
parameter at a time.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError, UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.models.loading.deferral import read_weight
from rlhf_core.util.messages import progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch

__all__ = [
    "Json",
    "assign",
    "clear_gradients",
    "forward",
    "gather_weights",
    "initialize",
    "join_shares",
    "library",
    "mark_leaves",
    "select_ranks",
    "shard",
    "show",
    "silence_deepspeed",
    "whole",
    "whole_weights",
]

Json = dict[str, Any]


def library() -> Any:
    """The package deepspeed, imported and set up for training. `DeepSpeed.check` decides which versions are supported."""
    import deepspeed

    # inference on CPUs would use this operation, training does not: spare the minute and the compiler it takes to build
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # it warns of module inputs that are no tensors: ours hold token ids, through which no gradient flows
    deepspeed.runtime.zero.utils.warned = True
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's business
    return deepspeed


@contextmanager
def silence_deepspeed() -> Iterator[None]:
    """Swallows what DeepSpeed prints past its log level: memory reports, names of files."""
    with redirect_stdout(io.StringIO()):
        yield


def shard(module: nn.Module, config: Json, device: torch.device) -> None:
    """Stage 3: read and cut every parameter, one at a time, so that no host or device ever holds the whole model."""
    deepspeed = library()
    # DeepSpeed makes the groups of a node once in a process, and refuses to make them again for a second role
    node = deepspeed.utils.groups._get_zero_param_intra_parallel_group()
    one_by_one = torch.nn.Module()
    one_by_one.parameters = partial(_read_one_by_one, module, config)  # type: ignore[method-assign]
    deepspeed.zero.Init(module=one_by_one, config_dict_or_path=config, zero_param_parallel_group=node)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _read_one_by_one(module: nn.Module, config: Json, recurse: bool = True) -> Iterator[nn.Parameter]:
    """Yield the parameters with their numbers, in the dtype that the engine computes in; the next is read after one is cut."""
    narrow = [dtype for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if config[name]["enabled"]]
    for parameter in module.parameters(recurse):
        read_weight(parameter)
        for dtype in narrow:
            parameter.data = parameter.data.to(dtype)
        yield parameter


def mark_leaves(module: nn.Module, classes: Sequence[str]) -> None:
    """Let stage 3 gather all weights inside modules of these classes at once, whichever of them a row uses.

    Raises:
        OptionError: the model has no module of a class.
    """
    known = {type(each).__name__ for each in module.modules()}
    for name in classes:
        if name not in known:
            blocks = ", ".join(sorted(each for each in known if each not in vars(torch.nn)))
            raise OptionError("leaf_modules", f"the model has no module of class {name!r}; name one of {blocks}")
    if classes:
        library().utils.set_z3_leaf_modules(module, list(classes))


def initialize(
    module: nn.Module, config: Json, optimizer: torch.optim.Optimizer | None = None, ranks: Any = None
) -> Any:
    """The engine. Its dtypes, sharding and communication are those of `config`.

    Args:
        ranks: the groups of ranks where several share a model (`mpu` of DeepSpeed); None: all shard and reduce together.
    """
    deepspeed = library()
    deepspeed.utils.groups.mpu = ranks  # else it takes those of the engine before
    with silence_deepspeed():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=ranks)
    return engine


def select_ranks(engine: Any) -> None:
    """Let DeepSpeed reduce over the engine's groups of ranks, which it looks up in a global variable when it reduces."""
    from deepspeed.utils import groups

    groups.mpu = engine.mpu


def show(whose: str, config: Json) -> None:
    """Print a configuration on the first rank, to standard error."""
    if torch.distributed.get_rank() == 0:
        progress.info(f"deepspeed, {whose}: {json.dumps(config, indent=1)}")


def forward(engine: Any, batch: Batch, names: frozenset[str], device: torch.device) -> dict[str, Tensor]:
    """The module's outputs, through the engine."""
    from rlhf_core.models.inputs.arrange import arrange_inputs

    if any(batch.images) and torch.distributed.get_world_size() > 1:
        # a rank whose rows have none would not take part in what is gathered and reduced for the vision tower
        raise UsageError(
            f"strategy deepspeed supports images only in one process; use {run_option('strategy', 'torch')}, or one "
            "rank"
        )
    differentiate = torch.is_grad_enabled()
    # weights that stage 3 gathers in inference mode could never take part in a backward pass afterwards
    with torch.inference_mode(False), torch.set_grad_enabled(differentiate):
        outputs: dict[str, Tensor] = engine(arrange_inputs(batch).to(device), names)
    return outputs


def clear_gradients(engine: Any, stage: int) -> None:
    """Forget what DeepSpeed keeps of a step's gradients.

    Else a weight that the next step leaves out (an unused expert) has this gradient in it, and one that was not finite
    stays.
    """
    optimizer = engine.optimizer
    if stage == 0:
        return
    kept = [optimizer.grad_partitions_flat_buffer] if stage == 3 else []
    if engine.zero_use_cpu_optimizer():
        masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        kept += [each.grad for each in masters]
    if engine.zero_use_cpu_optimizer() and stage < 3:
        kept += optimizer.accumulated_grads_in_cpu.values()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        for parameter in engine.module.parameters():
            parameter.grad_accum = None
    for gradient in kept:
        if gradient is not None:
            gradient.zero_()


def whole_weights(module: nn.Module, elements: int) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under their Hugging Face names, gathered about `elements` at a time. Collective."""
    buckets = _Buckets(list(module.parameters()), elements)
    yield from module.hf_weights(buckets.full)  # type: ignore[operator]
    buckets.close()


def whole(parameter: Tensor) -> Tensor:
    """Return the whole of a sharded parameter. Collective."""
    with library().zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def join_shares(parameter: Any, share: Tensor, device: torch.device) -> Tensor:
    """Return the whole of a tensor that is cut as a sharded parameter is. Collective.

    Args:
        parameter: sharded.
        share: (elements,), this rank's, padded as `parameter.ds_tensor`.
        device: where ranks exchange tensors.
    """
    share = share.to(device)
    flat = share.new_empty(torch.distributed.get_world_size() * share.numel())
    torch.distributed.all_gather_into_tensor(flat, share)
    return flat.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Write a whole tensor into a sharded parameter. Collective; a buffer is whole on every rank."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(whole)
        return
    with library().zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(whole)


class _Buckets:
    """Sharded parameters, whole a bucket at a time, for a reader that takes them in the module's order."""

    def __init__(self, parameters: list[nn.Parameter], elements: int) -> None:
        self._parameters = parameters
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._elements = elements
        self._open = ExitStack()
        self._whole: set[int] = set()

    def full(self, parameter: Tensor) -> Tensor:
        """Return the whole of `parameter`: the bucket that begins with it is opened, unless it is in the open one."""
        if id(parameter) not in self._whole:
            self.close()
            bucket = self._next_bucket(self._places[id(parameter)])
            self._open.enter_context(library().zero.GatheredParameters(bucket))
            self._whole = {id(each) for each in bucket}
        return parameter.detach().clone()  # its bucket's memory goes with the bucket

    def close(self) -> None:
        """Release the open bucket."""
        self._open.close()
        self._whole = set()

    def _next_bucket(self, place: int) -> list[nn.Parameter]:
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in self._parameters[place:]:
            size += parameter.ds_numel  # type: ignore[attr-defined]
            if bucket and size > self._elements:
                break
            bucket.append(parameter)
        return bucket


@contextmanager
def gather_weights(engine: Any) -> Iterator[None]:
    """Hold all weights of a stage 3 engine's module on every rank, without the hooks that would release them.

    Collective when it opens and closes, and only then. Inside another such context it changes nothing.
    """
    hooks = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if not hooks.forward_hooks:
        yield
        return
    with library().zero.GatheredParameters(list(engine.module.parameters())):
        hooks._remove_module_hooks()
        hooks.forward_hooks.clear()
        hooks.backward_hooks.clear()
        try:
            yield
        finally:
            hooks.setup_zero_stage3_hooks()
