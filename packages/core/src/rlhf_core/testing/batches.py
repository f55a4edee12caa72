"""Small hand-made batches for tests of what the loop does with them."""

from __future__ import annotations

import torch

from rlhf_core.contract.batch import Batch, Rollouts


def make_batch(
    lengths: list[int], prompt_lengths: list[int] | None = None, groups: list[int] | None = None
) -> Rollouts:
    """N completions of the given lengths; token ids count up so that every cell is different."""
    N, T = len(lengths), max(lengths)
    prompt_lengths = prompt_lengths or [2] * N
    L = max(prompt_lengths)
    mask_NT = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    return Rollouts(
        prompts=[f"p{i}" for i in range(N)],
        texts=[f"t{i}" for i in range(N)],
        prompt_NL=(torch.arange(N * L).view(N, L) + 1)
        * (torch.arange(L)[None] < torch.tensor(prompt_lengths)[:, None]),
        prompt_lengths_N=torch.tensor(prompt_lengths),
        tokens_NT=(torch.arange(N * T).view(N, T) + 1) * mask_NT,
        lengths_N=torch.tensor(lengths),
        mask_NT=mask_NT,
        group_N=torch.tensor(groups or list(range(N))),
        labels=[None] * N,
        meta=[{}] * N,
        finish=["stop"] * N,
    )


def values_like(batch: Batch, seed: int = 0) -> torch.Tensor:
    """Float64 noise in the shape of the mask."""
    return torch.randn(batch.mask_NT.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
