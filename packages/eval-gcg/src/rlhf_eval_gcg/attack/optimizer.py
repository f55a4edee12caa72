"""The protocol of a suffix optimizer, so that another search is a plugin.

An optimizer yields questions about suffixes and receives the answers. The engine asks them of the models, for several suffixes
in one batch, and counts operations. This is plain GCG with one candidate, in full:

    class OneByOne:
        def __init__(self, options): ...
        def step(self, suffix):
            gradient_LV, loss = yield TokenGradient(suffix.ids_L)
            trial_L = suffix.ids_L.clone()
            trial_L[0] = gradient_LV[0].argmin()
            losses_C = yield Losses(trial_L[None])
            return Move(trial_L, float(losses_C[0]))

Choose it with `--evaluator.schedule my_module:OneByOne`, or `Attack(schedule="my_module:OneByOne")`. State that must survive a
crash goes into `suffix.memory`; draws come from `suffix.generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rlhf_core.errors import OptionError
from rlhf_core.plugins.import_paths import add_working_folder
from rlhf_eval_gcg.attack.options import SCHEDULES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["Losses", "Move", "Suffix", "SuffixOptimizer", "TokenGradient", "load_optimizer"]


@dataclass
class TokenGradient:
    """The question for the gradient of the loss; the answer is (gradient_LV, loss)."""

    choice: Tensor
    """token ids (L,), or weights of tokens (L, V) for a mixture of embeddings"""


@dataclass
class Losses:
    """The question for the losses of candidates; the answer is losses_C."""

    ids_CL: Tensor
    """the candidates"""
    by_draft: bool = False
    """ask the draft model"""


@dataclass
class Move:
    """The end of a step."""

    ids_L: Tensor
    """the suffix that the next step starts from"""
    loss: float
    """loss of the next suffix"""


@dataclass
class Suffix:
    """View of the suffix that an optimizer improves."""

    ids_L: Tensor
    """the current tokens"""
    options: Attack
    """options of the attack"""
    allowed_V: Tensor
    """bool, tokens that a suffix may contain"""
    generator: torch.Generator
    """generator of all random draws, on the CPU"""
    survivors: Callable[[Tensor], Tensor]
    """returns which candidates (C, L) become the same tokens again in their place in the chat (C,)"""
    letters_M: Tensor
    """tokens of single letters and signs, for random beginnings; may be empty"""
    answer_M: Tensor
    """allowed tokens of the texts that the attack aims at, each once; empty if it aims at none"""
    place: str
    """name of the goal, for messages"""
    has_draft: bool = False
    """True if there is a draft model"""
    loss: float = float("inf")
    """loss of the current tokens; infinite before the first step"""
    step: int = 0
    """steps done"""
    progress: float = 0.0
    """share of the budget, steps or operations, that is used: 0 to 1"""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """state of the optimizer between steps, kept across a crash"""


@runtime_checkable
class SuffixOptimizer(Protocol):
    """Improves a suffix step by step; see the module's text."""

    def __init__(self, options: Attack) -> None: ...

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        """Yield questions and return the next suffix; `suffix` is read only, but for its memory."""
        ...


def load_optimizer(options: Attack) -> SuffixOptimizer:
    """Return the optimizer that `options.schedule` names.

    Raises:
        OptionError: there is no such class.
    """
    path = SCHEDULES.get(options.schedule, options.schedule)
    module, _, name = path.partition(":")
    add_working_folder()
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            "schedule",
            f"{options.schedule!r} cannot be imported: {error}; give module:Class of an installed module, or of one in the "
            "working folder",
        ) from None
    try:
        made = make(options)
    except TypeError as error:
        raise OptionError(
            "schedule", f"{options.schedule!r} must be a class that takes the options: {error}"
        ) from error
    if not isinstance(made, SuffixOptimizer):
        raise OptionError(
            "schedule", f"{options.schedule!r} has no method step(suffix), which does a step of the search"
        )
    return made
