"""From a batch to what a model reads: rows of prompt and completion, and where to look in the states that come out.

A row is its prompt immediately followed by its completion, left-aligned and padded on the right: position 0 is the first
token, and causal attention keeps real tokens from seeing padding without any mask. A completion token is predicted by the
state one position before it; only those states reach a head.

Shape letters: N rows, S longest prompt + completion, T longest completion, M completion tokens of all rows, R rows that are
read: N, or more where completions have segments (`models.inputs.segments`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Self

from rlhf_core.lazy import torch
from rlhf_core.models.heads.kept_tokens import KeptTokens, arrange_kept
from rlhf_core.models.inputs.images import stack_images
from rlhf_core.models.inputs.segments import split_segments

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch

__all__ = ["Inputs", "arrange_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Inputs of `RoleModule.forward`."""

    ids_NS: Tensor
    """int64 token ids, zero where padded"""
    states_M: Tensor
    """int64, flat positions in (N, S) that predict completion tokens"""
    slots_M: Tensor
    """int64, flat positions in (N, T) of those tokens"""
    targets_M: Tensor
    """int64, those tokens"""
    last_N: Tensor
    """int64, flat positions in (N, S) of each row's last token"""
    tokens_NT: Tensor
    """int64, the batch's completion tokens; only their shape is used"""
    kept: KeptTokens | None = None
    """the kept sets of those tokens; None where nothing was cut"""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """model inputs for the images of all rows, by name (`models.inputs.images`); empty where no row has one"""
    ends_R: Tensor | None = None
    """int64, flat positions of the last token of each row of `ids_NS`, where completions have segments; None where a row is a
    completion with its prompt"""

    @property
    def row_ends(self) -> Tensor:
        """Flat positions of the last token of each row of `ids_NS`."""
        return self.last_N if self.ends_R is None else self.ends_R

    def to(self, device: torch.device | str) -> Self:
        """Return these inputs on another device."""
        optional = ("images", "kept", "ends_R")
        tensors = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in optional}
        return replace(
            self,
            **{name: tensor.to(device) for name, tensor in tensors.items()},
            images={name: tensor.to(device) for name, tensor in self.images.items()},
            kept=None if self.kept is None else self.kept.to(device),
            ends_R=None if self.ends_R is None else self.ends_R.to(device),
        )


def arrange_inputs(batch: Batch) -> Inputs:
    """The rows of `batch` as a model reads them.

    Every prompt has at least one token: the first completion token is predicted from something.
    """
    assert len(batch) == 0 or int(batch.prompt_lengths_N.min()) > 0, "a prompt without tokens"
    prompts_N1, lengths_N1 = batch.prompt_lengths_N[:, None], batch.lengths_N[:, None]
    rows_N1 = torch.arange(len(batch), device=prompts_N1.device)[:, None]
    S = int((prompts_N1 + lengths_N1).max()) if len(batch) else 0
    at_1S = torch.arange(S, device=prompts_N1.device)[None]
    after_NS = at_1S - prompts_N1  # position within the completion
    ids_NS = torch.where(
        after_NS < 0, _pick(batch.prompt_NL, at_1S.expand(after_NS.shape)), _pick(batch.tokens_NT, after_NS)
    ).masked_fill_(after_NS >= lengths_N1, 0)
    columns_1T = torch.arange(batch.tokens_NT.shape[1], device=prompts_N1.device)[None]
    used_NT = columns_1T < lengths_N1
    inputs = Inputs(
        ids_NS=ids_NS,
        states_M=(rows_N1 * S + prompts_N1 + columns_1T - 1)[used_NT],
        slots_M=used_NT.flatten().nonzero().squeeze(1),
        targets_M=batch.tokens_NT[used_NT],
        last_N=(rows_N1 * S + prompts_N1 + lengths_N1 - 1).squeeze(1),
        tokens_NT=batch.tokens_NT,
        kept=arrange_kept(batch),
        images=stack_images(batch.images, S),
    )
    return split_segments(inputs, batch)


def _pick(tokens: Tensor, columns_NS: Tensor) -> Tensor:
    """`tokens` at these columns, any token where there is no such column."""
    if tokens.shape[1] == 0:
        return torch.zeros_like(columns_NS)
    return tokens.gather(1, columns_NS.clamp(0, tokens.shape[1] - 1))
