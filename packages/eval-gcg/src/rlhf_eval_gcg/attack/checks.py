"""Check what a suffix optimizer asks and returns, so that a mistake in one of a plugin is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.optimizer import Losses, Move, TokenGradient

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.optimizer import Suffix

__all__ = ["check_move", "check_question"]


def check_question(suffix: Suffix, question: object) -> Any:
    """Return `question`, if the engine can answer it.

    Raises:
        UsageError: it is no question, or its tensor has a wrong shape, type or token.
    """
    L, V = len(suffix.ids_L), len(suffix.allowed_V)
    if isinstance(question, Losses):
        if question.by_draft and not suffix.has_draft:
            _refuse(suffix, "asks a draft model for losses, and there is none; read suffix.has_draft first")
        _check_ids(suffix, "Losses.ids_CL", question.ids_CL, ("C", L), V)
    elif isinstance(question, TokenGradient):
        choice = question.choice
        if isinstance(choice, torch.Tensor) and choice.is_floating_point():
            if tuple(choice.shape) != (L, V):
                _refuse(
                    suffix, f"asks for TokenGradient of weights {_size(choice)}; a mixture has the shape ({L}, {V})"
                )
        else:
            _check_ids(suffix, "TokenGradient.choice", choice, (L,), V)
    else:
        _refuse(suffix, f"asks for {type(question).__name__}; a suffix optimizer yields TokenGradient or Losses")
    return question


def check_move(suffix: Suffix, move: object) -> Move:
    """Return `move`, if the next step can start from it, and the memory can be saved.

    Raises:
        UsageError: it is no move, or the suffix, the loss or the memory has a wrong type or shape.
    """
    if not isinstance(move, Move):
        _refuse(suffix, f"returned {type(move).__name__} at the end of a step; return Move(ids_L, loss)")
    _check_ids(suffix, "Move.ids_L", move.ids_L, (len(suffix.ids_L),), len(suffix.allowed_V))
    if not isinstance(move.loss, (float, int)):
        _refuse(suffix, f"returned Move.loss as {type(move.loss).__name__}; write a number: float(losses_C[best])")
    for name, value in suffix.memory.items():
        if not isinstance(value, torch.Tensor):
            _refuse(suffix, f"keeps {name!r} in suffix.memory as {type(value).__name__}; keep tensors")
    return move


def _check_ids(suffix: Suffix, name: str, ids: Tensor, shape: tuple[int | str, ...], vocabulary: int) -> None:
    """Require token ids of `shape`, where a text stands for any number."""
    fits = (
        isinstance(ids, torch.Tensor)
        and ids.dtype == torch.int64
        and ids.dim() == len(shape)
        and all(isinstance(each, str) or each == size for each, size in zip(shape, ids.shape, strict=True))
    )
    if not fits:
        form = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        _refuse(suffix, f"gives {name} as {_size(ids)}; token ids are int64 of the shape ({form})")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        _refuse(
            suffix, f"gives {name} with tokens {int(ids.min())} to {int(ids.max())}, of a vocabulary of {vocabulary}"
        )


def _size(value: object) -> str:
    """Return type and shape of a value."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _refuse(suffix: Suffix, fault: str) -> NoReturn:
    raise UsageError(f"schedule {suffix.options.schedule!r} {fault}")
