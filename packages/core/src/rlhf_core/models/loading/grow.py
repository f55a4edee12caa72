"""New tokens: a tokenizer that has more than its model, and a model that is made to fit.

A new embedding begins at the mean of the old ones, and so does its row of the head (Hewitt 2021: the model then predicts the
new token about as often as an average one, and no old token's probability collapses). It is the same in every role and
process, which keeps a policy and its reference alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.errors import OptionError
from rlhf_core.models.loading.deferral import defer, is_deferred, placeholder, read_later, replace_parameters
from rlhf_core.util.messages import log
from rlhf_core.util.text_files import read_text

if TYPE_CHECKING:
    from torch import Tensor
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
    old = sorted(number for number in known - {*new} if number < before)
    if is_deferred(model.get_input_embeddings().weight):
        _grow_later(model, max(before, needed), old, new)
    else:
        if needed > before:
            model.resize_token_embeddings(needed, mean_resizing=False)  # its own way to the mean is to draw around it
        for parameter in _rows(model):
            _begin_at_mean(parameter, old, new)
    if int(os.environ.get("RANK", "0")) == 0:
        log.info(f"{name} has {model.new_tokens} new tokens, whose embeddings start at the mean")


def _grow_later(model: Any, size: int, old: list[int], new: list[int]) -> None:
    """Resize deferred embeddings to `size` rows, of which the `new` ones get numbers when the embeddings are read."""
    reads = [partial(_read_grown, read_later(each), size, old, new) for each in _rows(model)]
    replace_parameters(model, {each: _like(each, torch.empty_like(each, device="meta")) for each in _rows(model)})
    model.resize_token_embeddings(size, mean_resizing=False)
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for parameter, read in zip(_rows(model), reads, strict=True):
        if parameter not in made:  # tied to one before it
            made[parameter] = _like(parameter, placeholder(parameter.shape, parameter.dtype))
            defer(made[parameter], read)
    replace_parameters(model, made)


def _rows(model: Any) -> list[torch.nn.Parameter]:
    """The parameters of a model with a row per token: of its embedding, and of its head with its bias."""
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, *(() if head is None else (head.weight, getattr(head, "bias", None)))]
    return [each for each in found if each is not None]


def _like(parameter: torch.nn.Parameter, data: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad=parameter.requires_grad)


def _read_grown(read: Callable[[], Tensor], size: int, old: list[int], new: list[int]) -> Tensor:
    """Return what `read` returns, with `size` rows."""
    known = read()
    grown = known if len(known) == size else torch.cat([known, known.new_empty(size - len(known), *known.shape[1:])])
    _begin_at_mean(grown, old, new)
    return grown


@torch.no_grad()
def _begin_at_mean(rows: Tensor, old: list[int], new: list[int]) -> None:
    """Set the `new` rows of a matrix, or numbers of a vector, to the mean of the `old` ones."""
    rows[new] = rows[old].float().mean(0).to(rows.dtype)
