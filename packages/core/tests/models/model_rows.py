"""A role's spec and a batch of random tokens, for tests of what models make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec

LENGTHS = [(3, 5), (7, 1), (1, 4), (2, 0), (4, 9)]
"""Prompt and completion tokens of each row; one completion is empty."""


def spec(*outputs: str, name: str = "actor", trained: bool = True, **options: Any) -> RoleSpec:
    chosen = {"model": "tiny", **options}
    made = TrainedOptions(**chosen) if trained else ModelOptions(**chosen)
    return RoleSpec(name, made, frozenset(outputs), terms=(("data", None),) if trained else ())  # type: ignore[arg-type]


def rows(
    lengths: list[tuple[int, int]] = LENGTHS, vocab: int = 250, extra: int = 0
) -> tuple[Batch, list[tuple[Tensor, Tensor]]]:
    """A batch of random tokens, padded with `extra` more columns of garbage; and each row by itself."""
    draw = torch.Generator().manual_seed(0)
    single = [tuple(torch.randint(5, vocab, (n,), generator=draw) for n in pair) for pair in lengths]
    L, T = (max(pair[i] for pair in lengths) + extra for i in (0, 1))
    prompt_NL, tokens_NT = torch.full((len(lengths), L), 7), torch.full((len(lengths), T), 9)
    for i, (prompt, completion) in enumerate(single):
        prompt_NL[i, : len(prompt)], tokens_NT[i, : len(completion)] = prompt, completion
    lengths_N = torch.tensor([pair[1] for pair in lengths])
    batch = Batch(
        prompts=[""] * len(lengths),
        texts=[""] * len(lengths),
        prompt_NL=prompt_NL,
        prompt_lengths_N=torch.tensor([pair[0] for pair in lengths]),
        tokens_NT=tokens_NT,
        lengths_N=lengths_N,
        mask_NT=torch.arange(T)[None] < lengths_N[:, None],
        group_N=torch.arange(len(lengths)),
        labels=[None] * len(lengths),
        meta=[{}] * len(lengths),
    )
    return batch, single  # type: ignore[return-value]
