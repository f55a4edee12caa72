"""From ragged lists of sampled tokens to `Rollouts`: the one place where rollout engines meet the contract.

Every engine ends here, so that padding, masks, groups and texts are the same for all engines. Token ids are taken as they
were sampled; texts are decoded from them for rewards and for people, and never read back.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rlhf_core.contract.batch import Finish, Prompts, Rollouts
from rlhf_core.lazy import torch
from rlhf_core.util.padding import pad_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.kept_sets import KeptSets

    Row: TypeAlias = Sequence[float] | Tensor | array[Any]

__all__ = ["assemble", "decode", "pad_id"]

PART = 1 << 16
"""Tokens that are lists of Python numbers at a time, for the tokenizer."""


def assemble(
    prompts: Prompts,
    tokens: Sequence[Row],
    finish: Sequence[Finish],
    tokenizer: PreTrainedTokenizerBase,
    *,
    version: int = 0,
    versions: Sequence[Row] | None = None,
    per_token: Mapping[str, Sequence[Row]],
    scalars: Mapping[str, float] | None = None,
    mask: Sequence[Row] | None = None,
    texts: Sequence[str] | None = None,
    kept_sets: Sequence[KeptSets] = (),
) -> Rollouts:
    """Return P prompts and their N completions, those of a prompt adjacent, as a batch on the CPU.

    Args:
        prompts: what was asked.
        tokens: N sequences (lists; arrays or tensors cost no Python per token) with the EOS, all sampled without a `mask`.
        finish, tokenizer: N reasons; what makes the texts.
        version: of the policy that sampled.
        versions: N sequences with a version per token, if weights were updated while the engine sampled.
        per_token: extras by name, such as `sampler_logprobs_NT`, as N sequences with a number per token.
        scalars: numbers that hold for the whole batch.
        mask: N sequences, true where the policy sampled a token.
        texts, kept_sets: of N completions; texts are decoded from the tokens where absent.
    """
    group = [p for p in range(len(prompts)) for _ in range(len(tokens) // len(prompts))]
    tokens_NT, lengths_N = pad_rows(tokens, pad_id(tokenizer))
    prompt_NL, prompt_lengths_N = pad_rows([prompts.token_ids[p] for p in group], pad_id(tokenizer))
    examples = [prompts.examples[p] for p in group]
    inside_NT = torch.arange(tokens_NT.shape[1]) < lengths_N[:, None]
    mask_NT = inside_NT if mask is None else pad_rows(mask, False, torch.bool)[0]
    versions_NT = mask_NT * version if versions is None else pad_rows(versions)[0].masked_fill(~mask_NT, 0)
    decoded = decode(tokenizer, tokens) if texts is None else []
    columns = set.intersection(*(set(example.fields) for example in examples))
    return Rollouts(
        prompts=[prompts.texts[p] for p in group],
        texts=decoded if texts is None else list(texts),
        prompt_NL=prompt_NL,
        prompt_lengths_N=prompt_lengths_N,
        tokens_NT=tokens_NT,
        lengths_N=lengths_N,
        mask_NT=mask_NT,
        group_N=torch.tensor(group),
        labels=[example.label for example in examples],
        meta=[example.meta for example in examples],
        kept_sets=list(kept_sets),
        images=[prompts.images[p] for p in group] if prompts.images else [],
        raw_texts=_raw_texts(tokenizer, tokens_NT, mask_NT, finish, decoded),
        extras={
            "uids_N": torch.tensor([prompts.uids[p] for p in group]),
            "row_N": torch.tensor([example.row for example in examples]),
            "versions_NT": versions_NT,
            **{f"{name}_N": torch.tensor([float(each.fields[name]) for each in examples]) for name in sorted(columns)},
            **{name: pad_rows(rows, 0.0, torch.float32)[0] for name, rows in per_token.items()},
        },
        scalars=dict(scalars or {}),
        finish=list(finish),
    )


def _raw_texts(
    tokenizer: PreTrainedTokenizerBase, tokens_NT: Tensor, mask_NT: Tensor, finish: Sequence[str], texts: Sequence[str]
) -> list[str]:
    """Return texts of what was sampled, with special tokens but for one that ends a completion.

    A completion is decoded only if it has no text in `texts`, or an added token before its end: else its text is in `texts`.
    """
    special = frozenset(tokenizer.all_special_ids)
    added = [*special, *tokenizer.added_tokens_decoder]
    is_added_V = np.zeros(max(added, default=0) + 2, dtype=bool)
    is_added_V[np.array(added, dtype=np.int64)] = True
    raw = list(texts) or [""] * len(tokens_NT)
    again: dict[int, Row] = {}
    for i, (tokens_T, mask_T, how) in enumerate(zip(tokens_NT.numpy(), mask_NT.numpy(), finish, strict=True)):
        bare = tokens_T[mask_T]
        if how == "stop" and len(bare) and int(bare[-1]) in special:
            bare = bare[:-1]
        if not texts or is_added_V.take(bare, mode="clip").any():
            again[i] = torch.from_numpy(bare)
    for i, text in zip(again, decode(tokenizer, [*again.values()], skip_special=False), strict=True):
        raw[i] = text
    return raw


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Row], skip_special: bool = True) -> list[str]:
    """Return texts, without special tokens by default, with every space in the tokens."""
    texts: list[str] = []
    for part in _parts(tokens):
        lists = [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in part]
        decoded = tokenizer.batch_decode(lists, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        texts += map(str, decoded)
    return texts


def _parts(tokens: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield some rows at a time: as lists of numbers, all of a batch would take many times its tensors."""
    part: list[Row] = []
    held = 0
    for row in tokens:
        part.append(row)
        held += len(row)
        if held >= PART:
            yield part
            part, held = [], 0
    if part:
        yield part


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that pads short rows: the padding token, or EOS if there is none."""
    number: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(number)
