"""The states of a role by parameter, which any strategy can read in any cut.

A strategy that shards a role writes pieces: each rank's stretch of every parameter and of what the optimizer remembers of
it, in one safetensors file per rank.

    write_pieces(folder, rank, ranks, steps_done, pieces)      # on every rank
    ...
    states = open_states(folder, names)                        # any number of ranks, any strategy with `by_parameter`
    states.read("model.norm.weight", "exp_avg", 0, 64)         # 64 numbers, wherever they were

The strategy `torch` writes whole tensors, `module.safetensors` and `optimizer.safetensors`, which read the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.util.tensor_tree import read_stored_tree, read_tree, write_tree

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "WEIGHT",
    "ParameterStates",
    "Piece",
    "Scale",
    "open_states",
    "optimizer_states",
    "parameter_names",
    "write_pieces",
]

WEIGHT = "weight"
"""the kind of a parameter's own numbers; other kinds are the optimizer's, such as `exp_avg`"""


Scale = tuple[float, int]
"""the scale of float16's loss, and the steps since the last overflow or since it grew"""


@dataclass(frozen=True)
class Piece:
    """A stretch of one flattened parameter."""

    name: str
    start: int
    """the first of its elements"""
    tensors: Mapping[str, Tensor]
    """(elements,) by kind"""
    values: Mapping[str, Any] = field(default_factory=dict)
    """optimizer state of the whole parameter: numbers and tensors of one element, such as `step`"""


def write_pieces(
    folder: str | Path, rank: int, ranks: int, steps_done: int, pieces: Iterable[Piece], scale: Scale | None = None
) -> None:
    """Write the pieces that this rank holds. Together the ranks' pieces cover every parameter once or more."""
    rows = [[piece.name, piece.start, dict(piece.tensors), dict(piece.values)] for piece in pieces]
    common = {"ranks": ranks, "steps_done": steps_done, "scale": scale and list(scale)}
    write_tree(_piece_file(folder, rank), {**common, "pieces": rows})


def _piece_file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"pieces-{rank:05d}.safetensors"


class ParameterStates:
    """State of a role in a checkpoint.

    Args:
        folder: the role's folder in the checkpoint; named in errors.
        steps_done: optimizer steps.
        stretches: for each parameter and kind the stretches that were written, as (first element, tensor or stored tensor).
        values: for each parameter what the optimizer remembers of it as a whole.
        scale: of float16's loss, as a `Scale`; None without one.
    """

    def __init__(
        self,
        folder: Path,
        steps_done: int,
        stretches: Mapping[tuple[str, str], Sequence[tuple[int, Any]]],
        values: Mapping[str, Mapping[str, Any]],
        scale: Sequence[Any] | None = None,
    ) -> None:
        self.folder = folder
        self.scale: Scale | None = (float(scale[0]), int(scale[1])) if scale else None
        self.steps_done = steps_done
        self.values = values
        self._stretches = stretches
        self._kinds: dict[str, list[str]] = {}
        for name, kind in stretches:
            self._kinds.setdefault(name, []).append(kind)

    def kinds(self, name: str) -> list[str]:
        """Return what is known of a parameter in addition to its weight, such as `exp_avg`; empty before the first step."""
        return [kind for kind in self._kinds.get(name, []) if kind != WEIGHT]

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """Return elements `start` to `start + count` of one kind of a flattened parameter; (count,), on the CPU.

        Raises:
            UsageError: the checkpoint does not hold all of them.
        """
        found: Tensor | None = None
        filled = start
        for first, stored in sorted(self._stretches.get((name, kind), []), key=lambda stretch: stretch[0]):
            begin, end = max(filled, first), min(start + count, first + _elements(stored))
            if begin == filled and begin < end:
                part: Tensor = stored[begin - first : end - first]
                if end - begin == count:
                    return part.clone()  # a slice is a view of the file
                found = torch.empty(count, dtype=part.dtype) if found is None else found
                found[begin - start : end - start] = part
                filled = end
        if found is None or filled < start + count:
            raise UsageError(
                f"{self.folder} lacks the elements {filled} to {start + count} of {kind} of {name}; resume from "
                "another checkpoint"
            )
        return found


def _elements(stored: Any) -> int:
    """Return the number of elements of a flat tensor, or of a stored one."""
    return int(stored.shape[0] if isinstance(stored, torch.Tensor) else stored.get_shape()[0])


def open_states(folder: str | Path, names: Sequence[str]) -> ParameterStates:
    """Open what a strategy with `by_parameter` wrote of a role.

    Args:
        folder: the role's folder in a checkpoint.
        names: the trained parameters in the order of the optimizer's groups (`parameter_names`).

    Raises:
        UsageError: a rank's file is missing, or the folder has neither form.
    """
    folder = Path(folder)
    if _piece_file(folder, 0).exists():
        return _open_pieces(folder)
    if not (folder / "module.safetensors").exists():
        raise UsageError(
            f"{folder} has no states by parameter, since an earlier version or another strategy wrote it; resume "
            "with that version or strategy"
        )
    module, state = (read_tree(folder / f"{name}.safetensors") for name in ("module", "optimizer"))
    stretches = {(name, WEIGHT): [(0, tensor.flatten())] for name, tensor in module.items()}
    values: dict[str, dict[str, Any]] = {}
    for number, known in state["optimizer"]["state"].items():
        name = names[number]
        for kind, value in known.items():
            if isinstance(value, torch.Tensor) and value.shape == module[name].shape and value.dim():
                stretches[name, kind] = [(0, value.flatten())]
            else:
                values.setdefault(name, {})[kind] = value
    scaler = state["scaler"]
    scale = (scaler["scale"], scaler["_growth_tracker"]) if scaler else None
    return ParameterStates(folder, state["steps_done"], stretches, values, scale)


def _open_pieces(folder: Path) -> ParameterStates:
    stretches: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    values: dict[str, dict[str, Any]] = {}
    first = read_stored_tree(_piece_file(folder, 0))
    for rank in range(first["ranks"]):
        path = _piece_file(folder, rank)
        if not path.exists():
            raise UsageError(
                f"{folder} lacks {path.name}, the part of one of the {first['ranks']} ranks that wrote it; restore it"
            )
        for name, start, tensors, known in read_stored_tree(path)["pieces"]:
            for kind, stored in tensors.items():
                stretches.setdefault((name, kind), []).append((start, stored))
            values.setdefault(name, {}).update({kind: _value(value) for kind, value in known.items()})
    return ParameterStates(folder, first["steps_done"], stretches, values, first.get("scale"))


def _value(stored: Any) -> Any:
    """Return a number, or a tensor of one element that was stored."""
    return stored[...].clone() if hasattr(stored, "get_shape") else stored  # two parameters must not share one


def parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the trained parameters of `module`, in the order of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_states(states: ParameterStates, shapes: Mapping[str, torch.Size]) -> dict[int, dict[str, Any]]:
    """Return the `state` of an optimizer's `state_dict()` over whole parameters.

    Args:
        states: what a checkpoint holds.
        shapes: shape of each trained parameter, by name, in the order of the optimizer's groups.
    """
    state: dict[int, dict[str, Any]] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        whole = {kind: states.read(name, kind, 0, shape.numel()).view(shape) for kind in states.kinds(name)}
        if whole or states.values.get(name):
            state[number] = {**states.values.get(name, {}), **whole}
    return state
