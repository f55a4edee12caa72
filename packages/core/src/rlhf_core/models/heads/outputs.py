"""Core's own outputs, and the states that every output is computed from.

    logprobs_NT, entropy_NT    the language-model head, in chunks; log-probabilities over kept sets, if the batch has some
    full_logprobs_NT           log-probabilities over the whole vocabulary
    logits_NT                  the sampled tokens' own logits, before the softmax
    values_NT                  a scalar head on the state before each completion token
    scores_N                   a scalar head on the state of a completion's last token, its EOS included
    features_NH                that state itself
    features_NTH               the states before each completion token

So `scores_N` is a linear function of `features_NH`, and `values_NT` one of `features_NTH`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_core.contract.outputs import Output, States
from rlhf_core.contract.requirements import letters, per_token, shape_of
from rlhf_core.errors import ContractError
from rlhf_core.models.heads.compare import rows_at_a_time
from rlhf_core.models.heads.kept_tokens import kept_logprobs

if TYPE_CHECKING:
    from rlhf_core.models.heads.modules import ChunkedHead
    from rlhf_core.models.inputs.arrange import Inputs

__all__ = ["CORE", "ModelStates", "check_output", "scatter_tokens"]


class ModelStates:
    """The `States` of one forward pass.

    Args:
        states: last hidden states of all cells (cells, H).
        states_M: which of them predict completion tokens.
        last_N: which of them are at the rows' last tokens.
        inputs: what the model read.
        language_head: the language-model head; asked for only by outputs that read it.
        entropy: whether the entropy is wanted, which comes with the log-probabilities.
    """

    def __init__(
        self,
        states: Tensor,
        states_M: Tensor,
        last_N: Tensor,
        inputs: Inputs,
        language_head: Callable[[], ChunkedHead],
        entropy: bool,
    ) -> None:
        self.inputs = inputs
        self.entropy = entropy
        self.language_head = language_head
        self._states, self._states_M, self._last_N = states, states_M, last_N

    @cached_property
    def tokens_MH(self) -> Tensor:
        return self._states.index_select(0, self._states_M)

    @cached_property
    def last_NH(self) -> Tensor:
        return self._states.index_select(0, self._last_N)

    @property
    def rows_M(self) -> Tensor:
        return self.inputs.slots_M // max(1, self.inputs.tokens_NT.shape[1])

    @property
    def targets_M(self) -> Tensor:
        return self.inputs.targets_M

    @cached_property
    def logprobs_and_entropy(self) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the targets, and the entropies if they are wanted, each (M,)."""
        found: tuple[Tensor, Tensor | None] = self.language_head()(self.tokens_MH, self.targets_M, entropy=self.entropy)
        return found

    @cached_property
    def logprobs_M(self) -> Tensor:
        """Log-probabilities of the targets, over their kept sets where the batch has some."""
        kept = self.inputs.kept
        if kept is None:
            return self.logprobs_and_entropy[0]
        return self._by_tokens(lambda logits_mV, tokens: kept_logprobs(logits_mV, self.targets_M[tokens], kept, tokens))

    def per_token(self, values: Tensor) -> Tensor:
        return scatter_tokens(values, self.inputs)

    def distribution(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return self._by_tokens(lambda logits_mV, _: function(logits_mV))

    def _by_tokens(self, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Return `function` of the logits of some tokens (m, V), and of which of the M they are; see `distribution`."""
        head, M = self.language_head(), len(self.tokens_MH)

        def at(states_mH: Tensor, tokens: slice) -> Tensor:
            return function(head(states_mH, scaled=True), tokens)

        rows = rows_at_a_time(head, self.tokens_MH)
        parts = [slice(start, min(start + rows, M)) for start in range(0, M, rows)] or [slice(0, 0)]
        pairs = [(self.tokens_MH[tokens], tokens) for tokens in parts]
        if not torch.is_grad_enabled() or not head.chunk:
            return torch.cat([at(*pair) for pair in pairs])
        return torch.cat([checkpoint(at, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs])


def scatter_tokens(values: Tensor, inputs: Inputs) -> Tensor:
    """Values of completion tokens (M, …) in their places (N, T, …)."""
    flat = values.new_zeros(inputs.tokens_NT.numel(), *values.shape[1:])
    return flat.index_put((inputs.slots_M,), values).view(*inputs.tokens_NT.shape, *values.shape[1:])


def check_output(name: str, output: Output, values: Tensor, inputs: Inputs) -> Tensor:
    """Return `values`, in float32, if they have the shape in the output's name.

    Raises:
        ContractError: they do not.
    """
    N, T = inputs.tokens_NT.shape
    rest = values.shape[2:] if per_token(name) else values.shape[1:]
    if len(letters(name)) != values.dim() or tuple(values.shape) != shape_of(name, (N, T), rest):
        raise ContractError(
            f"the output {name!r} ({type(output).__qualname__} of {type(output).__module__}) has shape "
            f"{tuple(values.shape)}, but its name requires ({', '.join(letters(name))}) with N = {N} and T = {T}"
        )
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


@dataclass(frozen=True)
class Logits(Output):
    """The sampled tokens' own logits."""

    language: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert isinstance(states, ModelStates)
        return states.per_token(states.language_head()(states.tokens_MH, states.targets_M, scaled=True))


@dataclass(frozen=True)
class Logprobs(Output):
    """Log-probabilities of the completion's tokens, over kept sets where the batch has some."""

    language: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert isinstance(states, ModelStates)
        return states.per_token(states.logprobs_M)


@dataclass(frozen=True)
class FullLogprobs(Output):
    """Log-probabilities of the completion's tokens, over the whole vocabulary."""

    language: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert isinstance(states, ModelStates)
        return states.per_token(states.logprobs_and_entropy[0])


@dataclass(frozen=True)
class Entropy(Output):
    """Entropies of the distributions that the tokens were drawn from."""

    language: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert isinstance(states, ModelStates)
        entropy_M = states.logprobs_and_entropy[1]
        assert entropy_M is not None, "it was asked for"
        return states.per_token(entropy_M)


@dataclass(frozen=True)
class Values(Output):
    """A scalar head on the state before each completion token."""

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert head is not None
        return states.per_token(head(states.tokens_MH).squeeze(1))


@dataclass(frozen=True)
class Scores(Output):
    """A scalar head on the state of a completion's last token."""

    last_only: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        assert head is not None
        scores_N: Tensor = head(states.last_NH).squeeze(1)
        return scores_N


@dataclass(frozen=True)
class Features(Output):
    """The body's state at a completion's last token."""

    last_only: ClassVar[bool] = True

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        return states.last_NH.float()


@dataclass(frozen=True)
class TokenFeatures(Output):
    """The body's state before each completion token, the one that predicts it."""

    def __call__(self, states: States, head: nn.Module | None) -> Tensor:
        return states.per_token(states.tokens_MH.float())


CORE: dict[str, Output] = {
    "logits_NT": Logits(),
    "logprobs_NT": Logprobs(),
    "full_logprobs_NT": FullLogprobs(),
    "entropy_NT": Entropy(),
    "values_NT": Values(),
    "scores_N": Scores(),
    "features_NH": Features(),
    "features_NTH": TokenFeatures(),
}
"""Core's outputs by name, in the order in which a forward pass computes them."""
