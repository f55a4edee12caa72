"""A role's states by parameter: this rank's stretches of weights and moments, under every stage.

They are written and read without DeepSpeed's own files, so that a run continues under another stage, number of ranks, or
strategy, and reading a checkpoint runs no pickled code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.distributed import TorchWorld
from rlhf_core.lazy import torch
from rlhf_core.strategy.parameter_states import WEIGHT, Piece
from rlhf_strategy_deepspeed.engine import library

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.strategy.parameter_states import ParameterStates
    from rlhf_strategy_deepspeed.tensor import Cut, TensorShards

__all__ = ["rank_pieces", "read_states"]


@dataclass(frozen=True)
class _Stretch:
    """Part of one parameter or buffer on this rank."""

    name: str
    start: int
    """the first of its elements in the flattened parameter"""
    weight: Tensor
    """(elements,): float32 masters of what is trained; a view, so that writing into it changes the weight"""
    key: Tensor | None
    """object that the torch optimizer keeps states of: the parameter, or the flat shard that contains it; None: not
    trained"""
    offset: int = 0
    """the first of its elements in the flattened `key`"""
    repeated: bool = False
    """True if every rank holds the same"""
    cut: Cut | None = None
    """cut of the parameter over the ranks that share layers, of whose part this is a stretch; None: of the whole"""


def rank_pieces(engine: Any, stage: int, shards: TensorShards | None = None) -> Iterator[Piece]:
    """This rank's pieces of a trained role; those of all ranks together are the whole of it. Collective."""
    states = _base(engine).state
    world = TorchWorld() if shards is None else shards.world
    for stretch in _stretches(engine, stage, shards):
        if (stretch.repeated and world.rank > 0) or (stretch.cut is None and not world.first):
            continue
        known: Mapping[str, Any] = states.get(stretch.key, {}) if stretch.key is not None else {}
        tensors: dict[str, Tensor] = {WEIGHT: stretch.weight}
        values: dict[str, Any] = {}
        for kind, value in known.items():
            if _is_flat(value, stretch.key):
                tensors[kind] = _part(value, stretch)
            else:  # torch's AdamW counts its steps in a tensor
                values[kind] = torch.tensor(float(value)) if kind == "step" else value
        start = stretch.start
        if stretch.cut is not None:
            start += stretch.cut.first
            if stretch.cut.dim > 0:
                start, tensors = stretch.cut.first, _whole_rows(stretch, tensors, world, engine.device)
                if world.rank > 0:
                    continue
        yield Piece(stretch.name, start, tensors, values)


def _whole_rows(stretch: _Stretch, tensors: Mapping[str, Tensor], world: World, device: Any) -> dict[str, Tensor]:
    """Return a stretch of the flattened whole for each tensor of a matrix whose rows are cut, as long as this rank's part.

    Collective: a rank's part of such a matrix is no stretch of it.
    """
    assert stretch.cut is not None
    found: dict[str, Tensor] = {}
    for kind, tensor in tensors.items():
        part = torch.zeros(stretch.cut.shape.numel(), dtype=tensor.dtype, device=device)
        part.narrow(0, stretch.start, tensor.numel()).copy_(tensor)
        whole = stretch.cut.join(part if stretch.repeated else world.sum(part))
        found[kind] = whole.view(-1).narrow(0, stretch.cut.first, part.numel()).cpu()
    return found


def read_states(engine: Any, stage: int, states: ParameterStates, shards: TensorShards | None = None) -> None:
    """Restore this rank's stretches from what any number of ranks wrote. Collective."""
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # no parameter stays whole with its old numbers
    with torch.no_grad():
        for stretch in _stretches(engine, stage, shards):
            if stretch.weight.numel():
                _read(stretch, states, _base(engine))
        if stage == 3:
            _update_shards(engine.optimizer)
            engine.optimizer.checkpoint_event_epilogue()
        elif stage > 0:
            engine.optimizer.update_lp_params()


def _read(stretch: _Stretch, states: ParameterStates, optimizer: Any) -> None:
    stretch.weight.copy_(_read_kind(stretch, states, WEIGHT))
    if stretch.key is None:
        return
    known = optimizer.state[stretch.key]
    for kind in states.kinds(stretch.name):
        read = _read_kind(stretch, states, kind)
        if not _is_flat(known.get(kind), stretch.key):
            known[kind] = torch.zeros_like(stretch.key, dtype=read.dtype)
        _part(known[kind], stretch).copy_(read)
    counts = isinstance(optimizer, library().ops.adam.DeepSpeedCPUAdam)
    known.update({kind: int(value) if counts else value for kind, value in states.values.get(stretch.name, {}).items()})


def _read_kind(stretch: _Stretch, states: ParameterStates, kind: str) -> Tensor:
    """Return the numbers of one kind that a checkpoint has for a stretch."""
    read = partial(states.read, stretch.name, kind)
    count = stretch.weight.numel()
    return read(stretch.start, count) if stretch.cut is None else stretch.cut.read(read, stretch.start, count)


def _part(state: Tensor, stretch: _Stretch) -> Tensor:
    return state.view(-1).narrow(0, stretch.offset, stretch.weight.numel())


def _is_flat(value: Any, key: Tensor | None) -> bool:
    """Return True for a state that has a number for each of `key`, not one for all."""
    return isinstance(value, torch.Tensor) and key is not None and value.shape == key.shape and value.dim() > 0


def _base(engine: Any) -> Any:
    """Return torch's optimizer, around which ZeRO puts its own."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _stretches(engine: Any, stage: int, shards: TensorShards | None) -> Iterator[_Stretch]:
    """Yield this rank's parts in the module's order."""
    saved = engine.module.state_dict().keys()  # a frozen body is loaded again from where it came
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            stretch = _trained(engine, stage, name, parameter, shards.cut(parameter) if shards is not None else None)
            if stretch is not None:
                yield stretch
        elif name in saved and stage == 3:
            yield _share(name, parameter.ds_tensor.view(-1), parameter)
        elif name in saved:
            yield _Stretch(name, 0, parameter.data.view(-1), None, repeated=True)
    averages = _shared_averages(engine.module)
    for name, buffer in engine.module.named_buffers():
        if name in saved and stage == 3 and id(buffer) in averages:
            yield _share(name, buffer, averages[id(buffer)])
        elif name in saved:
            cut = shards.cut(averages[id(buffer)]) if shards is not None and id(buffer) in averages else None
            yield _Stretch(name, 0, buffer.data.view(-1), None, repeated=True, cut=cut)


def _share(name: str, share: Tensor, parameter: Any) -> _Stretch:
    """This rank's stretch of what stage 3 cuts as `parameter`, without the padding; not trained."""
    start = torch.distributed.get_rank() * share.numel()
    return _Stretch(name, start, share.narrow(0, 0, max(0, min(share.numel(), parameter.ds_numel - start))), None)


def _shared_averages(module: Any) -> dict[int, Any]:
    """Return the parameters that moving averages follow, by the ids of the averages."""
    named = module.average.by_name() if module.average is not None else {}
    return {id(average): module.get_parameter(name) for name, average in named.items()}


def _trained(engine: Any, stage: int, name: str, parameter: Any, cut: Cut | None) -> _Stretch | None:
    """This rank's stretch of a trained parameter; None if it has no part of it.

    Of a matrix whose rows are cut every rank has a stretch, which may be empty, since all take part in putting rows together.
    """
    if stage == 0:
        return _Stretch(name, 0, parameter.data.view(-1), parameter, repeated=True, cut=cut)
    optimizer = engine.optimizer
    if stage == 3:
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        key = optimizer.fp32_partitioned_groups_flat[group]
        start = torch.distributed.get_rank() * size
        count = max(0, min(size, parameter.ds_numel - start))
    else:
        mapping = parameter._hp_mapping
        if mapping is None and cut is not None and cut.dim > 0:
            group = next(i for i, some in enumerate(optimizer.bit16_groups) if any(each is parameter for each in some))
            key = optimizer.optimizer.param_groups[group]["params"][0]
            return _Stretch(name, 0, key.data.narrow(0, 0, 0), key, cut=cut)
        if mapping is None:
            return None
        key = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
        offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
        count = mapping.hp_fragment_address.numel
    return _Stretch(name, start, key.data.narrow(0, offset, count), key, offset, cut=cut) if count else None


def _update_shards(optimizer: Any) -> None:
    """Stage 3: the weights that the model computes with, from their float32 masters."""
    for masters, flat, parts in zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    ):
        flat.data.copy_(masters.data)
        for part, updated in zip(parts, optimizer.unflatten(flat, parts), strict=True):
            part.data = updated.data
