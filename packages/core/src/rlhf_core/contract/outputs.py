"""Outputs: what a role's forward pass can give, a table that plugins extend.

The name of an output states its shape, like every tensor's: `_N`, `_NH` or `_NK` per completion, `_NT`, `_NTH` or
`_NTK` per completion token. Losses ask for outputs of the role that they train, with gradient. Advantages, losses and
evaluators need `<role>.<output>` of any role, without. Nothing of size (N, T, V) exists: `States.distribution` is the
way to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

from rlhf_core.contract.providers import Provider

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Output", "States"]


class States(Protocol):
    """The body's last hidden states of a micro-batch, and what turns them into outputs. M counts the completion tokens."""

    @property
    def tokens_MH(self) -> Tensor:
        """The state before each completion token, the one that predicts it; rows one after the other."""
        ...

    @property
    def last_NH(self) -> Tensor:
        """The state at each completion's last token, its EOS included."""
        ...

    @property
    def rows_M(self) -> Tensor:
        """int64, the row of each completion token."""
        ...

    @property
    def targets_M(self) -> Tensor:
        """int64, the completion tokens."""
        ...

    def per_token(self, values: Tensor) -> Tensor:
        """Return values of completion tokens (M, …) in their places (N, T, …), zero elsewhere. Differentiable."""
        ...

    def distribution(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `function` of the next-token logits at every completion token, (M, …).

        It gets the logits of some tokens, float32 (m, V), after scale, soft cap and temperature, and returns (m, …). Logits are
        computed again in the backward pass, so that they exist for a few tokens at a time. Only outputs with `language`.
        """
        ...


class Output(Provider):
    """One output. A provider subclasses it, and is registered under the output's name: `{"quantiles_NTK": Quantiles}`."""

    language: ClassVar[bool] = False
    """True if it reads the language-model head (`States.distribution`); the role then has one"""
    last_only: ClassVar[bool] = False
    """True if it reads only `last_NH`; of a body that is not trained, one state per row is then kept"""

    def head(self, hidden: int) -> nn.Module | None:
        """Return a new head on states of this width, trained and saved with the role (`heads.safetensors`); None for none.

        It is made under a random state that depends on the run's seed, the role and the output's name.
        """
        return None

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        """Return the output of a micro-batch, in the shape that its name states. `head` is what `head()` made."""
        raise NotImplementedError
