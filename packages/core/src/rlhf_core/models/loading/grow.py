"""New tokens: a tokenizer that has more than its model, and a model that is made to fit.

A new embedding begins at the mean of the old ones, and so does its row of the head (Hewitt 2021: the model then predicts the
new token about as often as an average one, and no old token's probability collapses). It is the same in every role and
process, which keeps a policy and its reference alike.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.errors import OptionError
from rlhf_core.models.loading.deferral import read_whole
from rlhf_core.util.messages import log
from rlhf_core.util.text_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["add_tokens", "grow"]


def add_tokens(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Add the tokens in a file, one per line, that the tokenizer does not have yet.

    Raises:
        UsageError: there is no such file, or nothing in it.
    """
    try:
        lines = read_text(Path(file)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OptionError("/add_tokens", f"{file}: {reason}; give a text file with one token per line") from None
    tokens = [line for line in dict.fromkeys(lines) if line]
    if not tokens:
        raise OptionError("/add_tokens", f"{file} has no tokens; write one per line")
    tokenizer.add_tokens(tokens)


@torch.no_grad()
def grow(name: str, model: Any, tokenizer: PreTrainedTokenizerBase, added: Collection[int] = ()) -> None:
    """Give `model` embeddings for all tokens; `model.new_tokens` is the number that start at the mean of the old ones.

    Args:
        name: of the model, for messages.
        model: a model of transformers; it grows if it has too few rows.
        tokenizer: its tokenizer, with the tokens that the run adds.
        added: their ids; those that fall into the padding of a head have a row there that was never trained.
    """
    before = model.get_input_embeddings().weight.shape[0]
    known = {*tokenizer.get_vocab().values()}
    needed = max(known) + 1
    new = sorted({*range(before, needed), *added})
    model.new_tokens = len(new)
    if not new:
        return
    read_whole(model, f"{name} gets {model.new_tokens} new tokens, which start at the mean of the others")
    if needed > before:
        model.resize_token_embeddings(needed, mean_resizing=False)  # its own way to the mean is to draw around it
    old = sorted(number for number in known - {*new} if number < before)
    head = model.get_output_embeddings()
    for layer in (model.get_input_embeddings(), head):
        if layer is not None:
            layer.weight[new] = layer.weight[old].float().mean(0).to(layer.weight.dtype)
    if getattr(head, "bias", None) is not None:
        head.bias[new] = head.bias[old].float().mean().to(head.bias.dtype)
    if int(os.environ.get("RANK", "0")) == 0:
        log.info(f"{name} has {model.new_tokens} new tokens, whose embeddings start at the mean")
