"""New tokens: a tokenizer that has more than its model, and a model that is made to fit.

A new embedding begins at the mean of the old ones, and so does its row of the head (Hewitt 2021: the model then predicts the
new token about as often as an average one, and no old token's probability collapses). It is the same in every role and
process, which keeps a policy and its reference alike.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.errors import OptionError
from rlhf_core.util.messages import log
from rlhf_core.util.text_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["add_tokens", "grow"]


def add_tokens(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Add the tokens in a file, one a line, that the tokenizer does not have yet.

    Raises:
        UsageError: there is no such file, or nothing in it.
    """
    try:
        lines = read_text(Path(file)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise OptionError("/add_tokens", f"{file}: {reason}; it is a text file with one token a line") from None
    tokens = [line for line in dict.fromkeys(lines) if line]
    if not tokens:
        raise OptionError("/add_tokens", f"{file} has no tokens; write one a line")
    tokenizer.add_tokens(tokens)


@torch.no_grad()
def grow(name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `model` embeddings for all tokens, if it has too few; `model.new_tokens` says how many were added."""
    before = model.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    model.new_tokens = max(0, needed - before)
    if not model.new_tokens:
        return
    model.resize_token_embeddings(needed, mean_resizing=False)  # its own way to the mean is to draw around it
    head = model.get_output_embeddings()
    for layer in (model.get_input_embeddings(), head):
        if layer is not None:
            layer.weight[before:] = layer.weight[:before].float().mean(0)
    if getattr(head, "bias", None) is not None:
        head.bias[before:] = head.bias[:before].float().mean()
    if int(os.environ.get("RANK", "0")) == 0:
        log.info(f"{name} has {model.new_tokens} new tokens, whose embeddings begin at the mean")
