"""Tokens that are allowed in a suffix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError, option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["allowed_tokens", "letter_tokens"]

LETTERS = ". , ! ? ; : ( ) [ ] { } @ # $ % & * w x y z".split()
"""Texts of which random suffixes are made, as in nanoGCG."""


def allowed_tokens(tokenizer: Any, width: int, ascii_only: bool) -> Tensor:
    """Return a mask of the first `width` tokens that are allowed in a suffix, bool (V,).

    Special and added tokens are not, nor those that are no complete text: ids that the tokenizer does not have, halves of
    characters. With `ascii_only` a token is printable ASCII, as in the original.

    Raises:
        UsageError: none may.
    """
    tokens = min(width, len(tokenizer))
    barred = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = tokenizer.batch_decode(torch.arange(tokens)[:, None], clean_up_tokenization_spaces=False)
    allowed_V = torch.zeros(width, dtype=torch.bool)
    for number, text in enumerate(texts):
        plain = text.isascii() and text.isprintable() if ascii_only else "\ufffd" not in text
        allowed_V[number] = bool(text) and plain and number not in barred
    if not allowed_V.any():
        raise UsageError(f"no token of the vocabulary is allowed in a suffix; set {option('ascii', 'False')}")
    return allowed_V


def letter_tokens(tokenizer: Any, allowed_V: Tensor) -> Tensor:
    """Return the allowed tokens that are single letters or signs, with or without a blank before (M,)."""
    found: list[int] = []
    for letter in LETTERS:
        for text in (letter, f" {letter}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] < len(allowed_V) and bool(allowed_V[ids[0]]):
                found.append(ids[0])
    return torch.tensor(sorted(set(found)), dtype=torch.long)
