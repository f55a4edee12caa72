"""From ragged lists of sampled tokens to `Rollouts`: the one place where rollout engines meet the contract.

Every engine ends here, so that padding, masks, groups and texts are the same whoever sampled. Token ids are taken as they
were sampled; texts are decoded from them for rewards and for people, and never read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.lazy import torch
from rlhf_core.util.padding import pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.kept_sets import KeptSets

__all__ = ["assemble", "decode", "pad_id"]


def assemble(
    prompts: Prompts,
    tokens: Sequence[Sequence[int]],
    finish: Sequence[Literal["stop", "length", "turns", "seconds"]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    version: int = 0,
    versions: Sequence[Sequence[int]] | None = None,
    per_token: Mapping[str, Sequence[Sequence[float]]],
    scalars: Mapping[str, float] | None = None,
    mask: Sequence[Sequence[bool]] | None = None,
    texts: Sequence[str] | None = None,
    kept_sets: Sequence[KeptSets] = (),
) -> Rollouts:
    """P prompts and their N completions, those of a prompt adjacent, as a batch on the CPU.

    Args:
        prompts: what was asked.
        tokens: N sequences, the EOS that ends one included; all of them sampled unless `mask` is given.
        finish, tokenizer: N reasons; what makes the texts.
        version: of the policy that sampled.
        versions: N sequences with a version per token, if weights were updated while the engine sampled.
        per_token: extras by name, `sampler_logprobs_NT` say, as N sequences with a number per token.
        scalars: numbers that hold for the whole batch.
        mask: N sequences, true where the policy sampled a token.
        texts, kept_sets: of N completions; texts are decoded from the tokens where absent.
    """
    filler = pad_id(tokenizer)
    group = [p for p in range(len(prompts)) for _ in range(len(tokens) // len(prompts))]
    tokens_NT, lengths_N = pad_rows(tokens, filler)
    prompt_NL, prompt_lengths_N = pad_rows([prompts.token_ids[p] for p in group], filler)
    examples = [prompts.examples[p] for p in group]
    inside_NT = torch.arange(tokens_NT.shape[1]) < lengths_N[:, None]
    mask_NT = inside_NT if mask is None else pad_rows(mask, False, torch.bool)[0]
    versions_NT = torch.full(tokens_NT.shape, version) if versions is None else pad_rows(versions)[0]
    columns = set.intersection(*(set(example.fields) for example in examples))
    return Rollouts(
        prompts=[prompts.texts[p] for p in group],
        texts=decode(tokenizer, tokens) if texts is None else list(texts),
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
        raw_texts=_raw_texts(tokenizer, tokens, finish, mask),
        extras={
            "uids_N": torch.tensor([prompts.uids[p] for p in group]),
            "row_N": torch.tensor([example.row for example in examples]),
            "versions_NT": versions_NT.masked_fill(~mask_NT, 0),
            **{f"{name}_N": torch.tensor([float(each.fields[name]) for each in examples]) for name in sorted(columns)},
            **{name: pad_rows(rows, 0.0, torch.float32)[0] for name, rows in per_token.items()},
        },
        scalars=dict(scalars or {}),
        finish=list(finish),
    )


def _raw_texts(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[Sequence[int]],
    finish: Sequence[str],
    mask: Sequence[Sequence[bool]] | None,
) -> list[str]:
    """Texts of what was sampled, with special tokens but for one that ends a completion."""
    special = {*tokenizer.all_special_ids}
    rows = (
        [list(row) for row in tokens]
        if mask is None
        else [[token for token, sampled in zip(row, chosen) if sampled] for row, chosen in zip(tokens, mask)]
    )
    bare = [row[:-1] if how == "stop" and row and row[-1] in special else row for row, how in zip(rows, finish)]
    texts = tokenizer.batch_decode(bare, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [str(text) for text in texts]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts without special tokens, with every space that the tokens say."""
    texts = tokenizer.batch_decode(
        [list(row) for row in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [str(text) for text in texts]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up short rows: the padding token, or EOS where there is none."""
    number: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(number)
