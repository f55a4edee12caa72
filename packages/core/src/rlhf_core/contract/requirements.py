"""Needs: what an advantage or a loss reads from the batch, and which role's output provides it.

A provider declares `needs = frozenset({"ref_logprobs_NT"})`; the loop computes that and nothing else, and the role exists
because of it. Any output of any role can be requested as `"<role>.<output>"`, for example `"teacher.logprobs_NT"`; the
usual ones have short names. Nothing is computed twice, and nothing whose value is at hand: with one optimizer step per
batch the old log-probabilities are the ones of the training forward pass itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GIVEN",
    "LANGUAGE",
    "OUTPUTS",
    "ROUTER_LOSS",
    "SHORT",
    "Need",
    "letters",
    "per_row",
    "per_token",
    "place",
    "resolve",
    "rest_of",
    "shape_of",
    "split_output",
    "trim",
]

OUTPUTS = (
    "logprobs_NT",
    "full_logprobs_NT",
    "entropy_NT",
    "logits_NT",
    "values_NT",
    "scores_N",
    "features_NH",
    "features_NTH",
)
"""Core's own outputs of a role's forward pass: per token log-probability (`full_`: over the whole vocabulary, though the
sampler cut it), entropy, logit and value, per completion score, and
the body's states, at the last token and before each token. Plugins add others (`contract.outputs`)."""

LANGUAGE = frozenset({"logprobs_NT", "full_logprobs_NT", "entropy_NT", "logits_NT"})
"""Those of the language-model head."""

ROUTER_LOSS = "router_loss"
"""Loss that balances the experts of a mixture of experts: one number for a whole forward pass, added by the role itself."""

GIVEN = frozenset({"sampler_logprobs_NT", "rewards_N", "rewards_NT", "scores_N", "advantages_NT", "returns_NT"})
"""Extras that come from sampling, rewards and credit, without a forward pass."""

TRAINED = "<trained>"
"""Stands for the role that the term trains."""

SHORT = {
    "old_logprobs_NT": f"{TRAINED}.logprobs_NT",
    "old_full_logprobs_NT": f"{TRAINED}.full_logprobs_NT",
    "ref_logprobs_NT": "reference.logprobs_NT",
    "values_NT": "critic.values_NT",
}
"""Short names of the usual needs."""


@dataclass(frozen=True)
class Need:
    """One extra of a batch."""

    name: str
    """name of the need, in the provider and in the batch"""
    role: str = ""
    """role that computes it; empty if it is given"""
    output: str = ""
    """output of the role that it is"""


def letters(name: str) -> str:
    """Return the shape in a name: `NTK` of `critic.quantiles_NTK`; empty if there is none."""
    found = re.search(r"_([A-Z]+)$", name)
    return found[1] if found else ""


def per_token(name: str) -> bool:
    """Return True if the tensor of this name has a value per completion token: (N, T) or (N, T, …)."""
    return letters(name).startswith("NT")


def per_row(name: str) -> bool:
    """Return True if the tensor of this name has something per row: (N, …)."""
    return letters(name).startswith("N")


def split_output(name: str) -> tuple[str, str]:
    """Return role and output of `<role>.<output>`; the role is empty where the name has none."""
    role, _, output = name.rpartition(".")
    return role, output


def shape_of(name: str, batch_shape: Sequence[int], rest: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the shape of the tensor of this name for a batch of (N, T); `rest` are the sizes of its further letters."""
    return (*batch_shape, *rest) if per_token(name) else (batch_shape[0], *rest)


def rest_of(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the sizes of a tensor beyond rows and tokens: (K,) of `quantiles_NTK`."""
    return tuple(tensor.shape[2:] if per_token(name) else tensor.shape[1:])


def place(
    found: dict[str, Tensor], name: str, rows: Tensor | Sequence[int], values: Tensor, batch_shape: Sequence[int]
) -> None:
    """Put `values` of these rows into `found[name]`, which is made of zeros for a batch of (N, T) where it is missing."""
    if name not in found:
        found[name] = torch.zeros(shape_of(name, batch_shape, rest_of(name, values)))
    if per_token(name):
        found[name][rows, : values.shape[1]] = values
    else:
        found[name][rows] = values


def trim(name: str, tensor: Tensor, tokens: int) -> Tensor:
    """Return `tensor` with the columns of the first `tokens` tokens; unchanged where it has nothing per token."""
    return tensor[:, :tokens] if per_token(name) else tensor


def resolve(name: str, trained: str, asker: object, outputs: Collection[str] = OUTPUTS) -> Need:
    """The need called `name`, asked for by the provider `asker` in a term that trains `trained`.

    `outputs` are the names of what roles can give.

    Raises:
        UsageError: nothing provides it.
    """
    full = SHORT.get(name, name)
    role, output = split_output(full)
    if output in outputs and role:
        return Need(name, trained if role == TRAINED else role, output)
    if full in GIVEN or (not role and letters(full) == "N"):  # other `_N` names are data columns, checked when read
        return Need(name)
    known = ", ".join(sorted({*SHORT, *GIVEN}))
    raise UsageError(
        f"{type(asker).__name__} needs {name!r}, which nothing provides; the known names are {known}, "
        f"'<role>.<output>' with output one of {', '.join(outputs)}, and numeric data columns as '<column>_N'"
    )
