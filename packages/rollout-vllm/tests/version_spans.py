"""Log-probabilities of completions in whose middle weights arrived, by transformers.

A token after an update is sampled by the new weights over keys and values of the old ones. So transformers reads the completion
in spans of one version, each with that version's weights and the cache of the spans before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def span_logprobs(
    model: Any,
    weights: Mapping[int, Mapping[str, Tensor]],
    prompt: list[int],
    tokens: list[int],
    versions: list[int],
    temperature: float,
) -> Tensor:
    """Return transformers' log-probabilities of `tokens`, (T,): each span under its own weights, over one cache."""
    ids, cache, read, logprobs = [*prompt, *tokens], None, 0, []
    for version, span in groupby(versions):
        model.load_state_dict(weights[version], strict=False)
        end = len(prompt) + len(logprobs) + len(list(span))  # the last token of a span is read under the next weights
        with torch.no_grad():
            output = model(torch.tensor([ids[read : end - 1]]), past_key_values=cache, use_cache=True)
        targets = range(len(prompt) + len(logprobs), end)
        rows = torch.log_softmax(output.logits[0, -len(targets) :] / temperature, -1)
        logprobs += [rows[i, ids[target]] for i, target in enumerate(targets)]
        cache, read = output.past_key_values, end - 1
    return torch.stack(logprobs)
