"""Layers that several ranks compute together: the tensor parallelism of Megatron-LM (Shoeybi et al. 2019), in DeepSpeed's
AutoTP layers.

A rank holds some heads of the attention and some columns of the MLP. The matrices that go in are cut by output, those that come
out are cut by input, and a sum over the ranks follows each pair. transformers names both in a model's plan. Everything else
(embeddings, norms, heads) is whole on every rank, which computes the same with it.

All ranks of a group have the same rows, so losses see what one process sees.

Left out: plans that gather in between (Phi-3, OLMo 2) and experts, adapters, quantized weights, and images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.distributed import DataWorld, data_world
from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.lazy import torch
from rlhf_core.models.loading.deferral import read_weight
from rlhf_strategy_deepspeed.engine import library, silence_deepspeed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Cut", "TensorShards", "cut_layers"]

COLUMN, ROW, SUMMED = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""styles of transformers' plans: matrices cut by output, by input, and whole weights of which each rank has a part of the
gradient, such as norms of single heads"""

EMBEDDING = "embedding_rowwise"
"""the style of tied embeddings, which stay whole here"""


@dataclass(frozen=True)
class Cut:
    """The part of a parameter that this rank holds."""

    dim: int
    """the dimension that is cut, into equal parts"""
    shape: torch.Size
    """the shape of this rank's part"""
    rank: int
    size: int
    group: Any
    """the ranks that hold the parts"""

    @property
    def first(self) -> int:
        """The first of this rank's elements in the flattened whole, if it were cut into stretches."""
        return self.rank * self.shape.numel()

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor; a view."""
        return whole.chunk(self.size, self.dim)[self.rank]

    def join(self, part: Tensor) -> Tensor:
        """Return the whole of a tensor from every rank's part. Collective."""
        parts = [torch.empty(self.shape, dtype=part.dtype, device=part.device) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part.detach().view(self.shape).contiguous(), group=self.group)
        return torch.cat(parts, self.dim)

    def read(self, read: Callable[[int, int], Tensor], start: int, count: int) -> Tensor:
        """Return elements `start` to `start + count` of this rank's flattened part; (count,).

        Args:
            read: (first element, number) -> that stretch of the flattened whole.
        """
        if self.dim == 0:
            return read(self.first + start, count)
        width = self.shape[1]
        first, last = start // width, -(-(start + count) // width)
        rows = read(first * width * self.size, (last - first) * width * self.size).view(last - first, -1)
        return self.part(rows).reshape(-1)[start - first * width :][:count]


class _Ranks:
    """The groups of ranks, as DeepSpeed asks for them (`mpu`): those with other rows reduce gradients and shard states."""

    def __init__(self, world: DataWorld) -> None:
        self._world = world

    def get_data_parallel_group(self) -> Any:
        return self._world.group

    def get_data_parallel_rank(self) -> int:
        return self._world.rank

    def get_data_parallel_world_size(self) -> int:
        return self._world.size

    def get_model_parallel_group(self) -> Any:
        return self._world.neighbors

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self._world.neighbors)

    def get_model_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size(self._world.neighbors)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


@dataclass(frozen=True)
class _Site:
    """A matrix of the model that ranks share."""

    parent: nn.Module
    name: str
    layer: nn.Module
    """the layer that multiplies with this rank's part"""
    plain: nn.Module
    """the model's own layer, without weights"""


class TensorShards:
    """The cut layers of a module.

    Args:
        world: the ranks that have their own rows.
    """

    def __init__(self, world: DataWorld) -> None:
        self.world = world
        self.ranks = _Ranks(world)
        """`mpu` of a DeepSpeed engine"""
        self.rank: int = self.ranks.get_model_parallel_rank()
        self.size: int = self.ranks.get_model_parallel_world_size()
        self._cuts: dict[int, Cut] = {}
        self._sites: list[_Site] = []
        self._open = False

    def cut(self, parameter: Tensor) -> Cut | None:
        """Return how a parameter is cut; None: every rank has the whole."""
        return self._cuts.get(id(parameter))

    def full(self, parameter: Tensor) -> Tensor:
        """Return the whole of a parameter. Collective."""
        return self.join(parameter, parameter)

    def join(self, parameter: Tensor, part: Tensor) -> Tensor:
        """Return the whole of a tensor that is cut as `parameter` is. Collective."""
        cut = self.cut(parameter)
        return part.detach() if cut is None else cut.join(part)

    def part(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Return what this rank holds of a whole tensor in the place of `parameter`."""
        cut = self.cut(parameter)
        return whole if cut is None else cut.part(whole)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Clip gradients to a norm; returns that before. What every rank holds counts once. Collective."""
        counted = [each for each in parameters if self.cut(each) is not None or self.rank == 0]
        gradients = [each.grad for each in counted if each.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).square().to(parameters[0].device)
        torch.distributed.all_reduce(square, group=self.world.neighbors)
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Put the model's own layers back, with whole weights. Collective when it opens, and only then."""
        if self._open:
            yield
            return
        self._open = True
        try:
            for site in self._sites:
                for name, own in site.layer.named_parameters(recurse=False):
                    setattr(site.plain, name, torch.nn.Parameter(self.full(own), requires_grad=False))
                setattr(site.parent, site.name, site.plain)
            yield
        finally:
            self._open = False
            for site in self._sites:
                setattr(site.parent, site.name, site.layer)
                _empty(site.plain)

    def replace(self, parent: nn.Module, name: str, linear: nn.Module, dim: int) -> None:
        """Put a layer with this rank's part of the weights into the place of a linear one."""
        from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

        for parameter in linear.parameters():
            read_weight(parameter)
        layer = (LinearLayer if dim == 0 else LinearAllreduce)(linear, self.world.neighbors)
        for own in layer.parameters() if dim == 0 else [layer.weight]:
            self._cuts[id(own)] = Cut(dim, own.shape, self.rank, self.size, self.world.neighbors)
            own.ds_numel = own.numel() * self.size  # what reports count
        setattr(parent, name, layer)
        _empty(linear)
        self._sites.append(_Site(parent, name, layer, linear))

    def sum_gradient(self, parameter: nn.Parameter) -> None:
        """Let the gradient of a whole parameter be the sum of what each rank's part of the layer has of it."""

        def total(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            torch.distributed.all_reduce(gradient, group=self.world.neighbors)
            return gradient

        if parameter.requires_grad:
            parameter.register_hook(total)


def _empty(layer: nn.Module) -> None:
    """Take the weights from a layer that waits for whole ones."""
    for name, _ in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, None)


def cut_layers(module: Any, together: int) -> TensorShards:
    """Cut the layers of a role's module over `together` neighboring ranks; deferred weights are read one at a time. Collective.

    Raises:
        UsageError: the model's sizes or kind do not allow it.
    """
    body = module.model.base_model
    styles = _styles(module, body, together)
    from deepspeed.module_inject.layers import set_autotp_mode

    shards = TensorShards(data_world(together))
    with silence_deepspeed():
        library().init_distributed(auto_mpi_discovery=False, verbose=False)  # it takes the process group that there is
    set_autotp_mode(training=True)
    for name, style in styles.items():
        parent, _, last = name.rpartition(".")
        part = body.get_submodule(name)
        if style == SUMMED:
            for parameter in part.parameters():
                shards.sum_gradient(parameter)
        else:
            shards.replace(body.get_submodule(parent), last, part, dim=0 if style == COLUMN else 1)
    for parameter in module.parameters():
        read_weight(parameter)
    return shards


def _styles(module: Any, body: nn.Module, together: int) -> dict[str, str]:
    """Return what is done with the modules of a body that its plan names."""
    text = module.model.config.get_text_config(decoder=True)
    plan = {name: style for name, style in (text.base_model_tp_plan or {}).items() if style != EMBEDDING}
    named = {_pattern(name) for name, _ in (*body.named_modules(), *body.named_parameters())}
    other = sorted({style for name, style in plan.items() if name in named} - {COLUMN, ROW, SUMMED})
    styles = {name: plan[pattern] for name, _ in body.named_modules() if (pattern := _pattern(name)) in plan}
    odd = ""
    if module.adapters is not None:
        odd = "has adapters; train it without lora"
    elif module.vision is not None:
        odd = "reads images; choose one that reads text alone"
    elif any(each._compiled_call_impl is not None for each in body.modules()):
        odd = "is compiled; leave compile off"
    elif other:
        odd = f"needs {other[0]!r} in transformers' plan, which is not supported; choose another model"
    elif ROW not in styles.values():
        odd = "has no plan for it in transformers; choose another model"
    elif left := _left_out(body, styles):
        odd = f"has {left[0]}, which transformers' plan leaves out; choose another model"
    elif kinds := {type(body.get_submodule(name)) for name in styles if styles[name] != SUMMED} - {torch.nn.Linear}:
        odd = f"has layers of {kinds.pop().__name__}, not of plain weights; leave quantize out"
    if odd:
        raise UsageError(f"{option('tensor', together)} cuts layers, but the model {odd}")
    _check_sizes(text, body, styles, together)
    return styles


def _left_out(body: nn.Module, styles: dict[str, str]) -> list[str]:
    """Return the parameters beside cut matrices of which the plan does not say how they are shared."""
    parents = {name.rpartition(".")[0] for name, style in styles.items() if style != SUMMED}
    beside = [(parent, each) for parent in parents for each, _ in body.get_submodule(parent).named_parameters()]
    return sorted(f"{parent}.{each}" for parent, each in beside if f"{parent}.{each}".rpartition(".")[0] not in styles)


def _pattern(name: str) -> str:
    """Return a module's name as plans write it, with `*` for the number of a layer."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _check_sizes(text: Any, body: nn.Module, styles: dict[str, str], together: int) -> None:
    """Refuse heads and matrices that are not cut into equal parts."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    if heads % together or groups % together:
        raise OptionError(
            "tensor",
            f"{together} must divide the {heads} attention heads and the {groups} key-value heads; choose another number",
        )
    for name, style in styles.items():
        if style == SUMMED:
            continue
        weight = body.get_submodule(name).get_parameter("weight")
        width = weight.shape[0 if style == COLUMN else 1]
        head = getattr(body.get_submodule(name.rpartition(".")[0]), "head_dim", None) or 1  # of attention
        if width % (together * head):
            raise OptionError(
                "tensor", f"{together} does not divide the width {width} of {name}; choose another number"
            )
