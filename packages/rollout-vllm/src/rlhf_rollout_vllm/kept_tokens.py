"""The tokens that truncated sampling kept, read from vLLM's log-probabilities.

vLLM returns those of the likeliest tokens after truncation, minus infinity at what was cut. So under top-k, alone or with top-p
and min-p, they give the whole kept set. Without top-k a set can be as large as the vocabulary: none is asked for, and the
trainer applies the rules to its own logits.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.kept_sets import KeptSets, replays

if TYPE_CHECKING:
    from rlhf_core.contract.options import Sampling

__all__ = ["MOST", "listed_tokens", "read_kept_sets", "sampled_logprobs"]

LARGEST_TOP_K = 128
"""Python lists of more than this at each token would take longer than the model."""

TIES = 16
"""vLLM keeps all tokens that are as likely as the last of the top-k; so many of them are looked for."""

MOST = LARGEST_TOP_K + TIES
"""log-probabilities at a token that are asked for at most"""


def listed_tokens(sampling: Sampling, width: int) -> int:
    """Return how many of the likeliest tokens vLLM is to list at each token; 0 where the trainer finds the sets itself.

    Args:
        sampling: what truncates.
        width: tokens that the model's head has.
    """
    told = replays(sampling) and 0 < sampling.top_k <= LARGEST_TOP_K
    return min(sampling.top_k + TIES, width) if told else 0


def sampled_logprobs(flat: Any) -> list[float]:
    """Return the log-probabilities of the sampled tokens, which come first at each token of a completion.

    Args:
        flat: vLLM's `FlatLogprobs` of the completion.
    """
    return [flat.logprobs[start] for start in flat.start_indices]


def read_kept_sets(flat: Any, lacking: Collection[int]) -> KeptSets:
    """Return the kept sets of a completion.

    Args:
        flat: vLLM's `FlatLogprobs` of it: at each token the sampled one, then the likeliest.
        lacking: ids of the head that are never drawn.
    """
    never = frozenset(lacking)
    kept: list[list[int]] = []
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        pairs = zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True)
        kept.append(sorted({token for token, logprob in pairs if logprob > -inf} - never))
    return KeptSets.from_lists(kept)
