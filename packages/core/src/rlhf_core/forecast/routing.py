"""Numbers that operations on shapes ask for: indices, such as those of the experts that a mixture sends its tokens to.

Fake tensors have no numbers, so a router's choice is unknown, and a loop over the experts that were hit cannot run. `Routing`
replaces the choice by a balanced one: row i of a `topk` gets the entries i k to i k + k - 1, modulo their number, so that all
entries are chosen equally often, within one. What follows from indices alone is worked out with numbers, and only when an
operation asks for it.

Left out on purpose: numbers of weights and hidden states. An operation that asks for those fails as without `Routing`.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253  a base class is needed at once; only what runs passes imports this module
from torch import Tensor  # noqa: TID253
from torch._subclasses.fake_tensor import (  # noqa: TID253
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID253
from torch.utils._pytree import tree_leaves, tree_map  # noqa: TID253
from torch.utils.weak import WeakTensorKeyDictionary  # noqa: TID253

__all__ = ["Routing"]

aten: Any = torch.ops.aten

LIKE = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default}
"""Operations that read no numbers of their argument, only its shape and dtype."""


class Routing(TorchDispatchMode):
    """Gives fake tensors the numbers that follow from balanced choices; goes between a `FakeTensorMode` and a tracker."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chosen: dict[int, int] = {}
        """entries that a row chooses, by the number of entries it chooses from"""
        self._known: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._grouped_mm.default:
            return _grouped_product(*args, **kwargs)
        made = self._follow(func, args, kwargs)
        try:
            found = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if made is None:
                raise
            found = tree_map(_shape_of, made.value)
        self._remember(func, args, found, made)
        return found

    def _follow(self, func: Any, args: Any, kwargs: Any) -> _Numbers | None:
        """Return how the numbers of a result are found; None if they depend on unknown ones."""
        choice = self._choice(func, args)
        if choice is not None:
            return choice
        if func in LIKE:
            stands = _Numbers(torch.empty, ((),), {"dtype": args[0].dtype})
            return _Numbers(func, (_Numbers(aten.expand.default, (stands, args[0].shape), {}), *args[1:]), kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not all(each in self._known or not isinstance(each, FakeTensor) for each in tensors):
            return None
        known = tree_map(lambda each: self._known.get(each, each) if isinstance(each, Tensor) else each, (args, kwargs))
        return _Numbers(func, *known)

    def _choice(self, func: Any, args: Any) -> _Numbers | None:
        """Return the balanced choice in place of the largest entries of each row, or None for another operation."""
        if func not in (aten.topk.default, aten.argmax.default) or len(args) < 2:
            return None
        scores, kept = args[0], func is aten.argmax.default
        count, dim = (1, args[1]) if kept else (args[1], args[2] if len(args) > 2 else -1)
        if dim not in (-1, scores.dim() - 1):
            return None
        entries = scores.shape[-1]
        self.chosen[entries] = max(count, self.chosen.get(entries, 0))
        shape = scores.shape[:-1] if kept else (*scores.shape[:-1], count)
        return _Numbers(_spread_evenly, (shape, entries), {})

    def _remember(self, func: Any, args: Any, found: Any, made: _Numbers | None) -> None:
        """Keep how the tensors of a result are found, and forget those that unknown numbers were written to."""
        if made is None:
            for argument, each in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tree_leaves(each):
                        self._known.pop(tensor, None)
        elif func is aten.topk.default:
            self._known[found[1]] = made  # the largest scores stay unknown
        elif isinstance(found, Tensor):
            self._known[found] = made
        elif isinstance(found, (tuple, list)):
            for number, each in enumerate(found):
                if isinstance(each, Tensor):
                    self._known[each] = _Numbers(_part, (made, number), {})


class _Numbers:
    """An operation on numbers that is carried out when it is first asked for."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self._call: Any = (func, args, kwargs)
        self._value: Any = None

    @property
    def value(self) -> Any:
        """The result; tensors in it hold numbers."""
        if self._call is not None:
            func, args, kwargs = self._call
            writes = isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable
            with unset_fake_temporarily(), torch.no_grad():
                args, kwargs = tree_map(lambda each: _value_of(each, writes), (args, kwargs))
                self._value, self._call = func(*args, **kwargs), None
        return self._value


def _value_of(each: Any, writes: bool) -> Any:
    """Return the numbers of an argument; a copy if the operation writes to its arguments."""
    value = each.value if isinstance(each, _Numbers) else each
    return value.clone() if writes and isinstance(value, Tensor) else value


def _part(values: Any, number: int) -> Any:
    """Return one of several results."""
    return values[number]


def _spread_evenly(shape: Any, entries: int) -> Tensor:
    """Return the numbers 0 to entries - 1 again and again, in a tensor of `shape`."""
    return torch.arange(torch.Size(shape).numel()).remainder(entries).reshape(shape)


def _shape_of(value: Any) -> Any:
    """Return a tensor without numbers of the shape of `value`; anything else as it is."""
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _grouped_product(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,  # noqa: ARG001  torch's signature
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the shape of a product with a matrix per group; torch's own refuses float32 shapes, which it multiplies.

    Groups are ranges of the one dimension that a two-dimensional operand has in place of two (`torch._grouped_mm`).
    """
    groups = (len(offs),) if left.dim() == right.dim() == 2 and offs is not None else ()
    groups = (len(left),) if left.dim() == right.dim() == 3 else groups
    return left.new_empty((*groups, left.shape[-2], right.shape[-1]), dtype=out_dtype or left.dtype)
