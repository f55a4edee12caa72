"""Kept sets are read from vLLM's flat lists, and asked for only where they are small."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace

import pytest

from rlhf_core.contract.options import Sampling
from rlhf_rollout_vllm.kept_tokens import LARGEST_TOP_K, MOST, TIES, listed_tokens, read_kept_sets, sampled_logprobs


def test_what_was_cut_and_what_the_tokenizer_lacks_are_in_no_set() -> None:
    """Two tokens with the sampled one and the three likeliest: token 9 was sampled, tokens 4 and 5 were cut, 7 is lacking."""
    flat = SimpleNamespace(
        start_indices=[0, 4],
        end_indices=[4, 8],
        token_ids=[9, 2, 9, 4, 1, 1, 7, 5],
        logprobs=[-1.0, -0.5, -1.0, -inf, -0.1, -0.1, -100.0, -inf],
    )
    sets = read_kept_sets(flat, lacking=(7, 8))
    assert (sets.counts_T.tolist(), sets.ids_K.tolist()) == ([2, 1], [2, 9, 1])
    assert sampled_logprobs(flat) == [-1.0, -0.1]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), 0),
        (Sampling(top_p=0.9), 0),
        (Sampling(top_k=20), 20 + TIES),
        (Sampling(top_k=20, top_p=0.9), 20 + TIES),
        (Sampling(top_k=LARGEST_TOP_K), MOST),
        (Sampling(top_k=LARGEST_TOP_K + 1), 0),
        (Sampling(top_k=20, replay="off"), 0),
        (Sampling(top_k=20, temperature=0.0), 0),
    ],
)
def test_lists_are_asked_for_under_a_top_k_that_is_replayed(sampling: Sampling, expected: int) -> None:
    assert listed_tokens(sampling, width=1000) == expected
    assert listed_tokens(sampling, width=30) == min(expected, 30), "no more than the head has"
