"""The boundary between texts that become tokens: a prompt and its completion, a turn and what follows it.

Text that follows a text gets the ids that it has in the whole text, if it starts with those of the first text. Else (a
prompt that ends with a blank, which would merge with the next word) it is tokenized apart, since sampling continues the ids
of the prompt as they are. Tokenizers in the manner of sentencepiece put a blank before every text; such a blank is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextTokenizer", "common_length"]

ANCHORS = ("\n", ".", "0")
"""Texts before a piece, for a tokenizer that changes the beginning of a text; the first is used that stays as it is."""


class TextTokenizer:
    """Tokenizes texts, alone or as what follows others.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer

    def ids(self, text: str, origin: str = "") -> list[int]:
        """Return the ids of a text without additions.

        Raises:
            DataError: the text holds half a character.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = text[error.start]
                raise DataError(
                    f"{origin}: {half!r} is half of a surrogate pair, which is not valid text; remove it or write "
                    "both halves"
                ) from None
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def with_bos(self, text: str, origin: str = "") -> list[int]:
        """Return the ids of a plain text that begins as the tokenizer begins texts: with its BOS, once.

        A text that was rendered before brings its BOS. An EOS that the tokenizer adds is left out.
        """
        plain = self.ids(text, origin)
        full: list[int] = self._tokenizer(text)["input_ids"]
        if plain[:1] == [self._tokenizer.bos_token_id]:
            return plain
        ended = full[-1:] == [self._tokenizer.eos_token_id] != plain[-1:]
        return full[:-1] if ended else full

    def following(self, before: str, text: str, origin: str = "") -> list[int]:
        """Return the ids of `text` as it follows `before`."""
        whole, first = self.ids(before + text, origin), self.ids(before, origin)
        return whole[len(first) :] if whole[: len(first)] == first else self.piece(text, origin)

    def piece(self, text: str, origin: str = "") -> list[int]:
        """Return the ids of a text in the middle of others: without what the tokenizer puts before a text."""
        for anchor in ANCHORS if self._changes_beginnings else ():
            first, whole = self.ids(anchor), self.ids(anchor + text, origin)
            if whole[: len(first)] == first:
                return whole[len(first) :]
        return self.ids(text, origin)

    @cached_property
    def _changes_beginnings(self) -> bool:
        """True if a word at the beginning of a text is another token than after a line break."""
        return self.ids("\na") != [*self.ids("\n"), *self.ids("a")]


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many ids or letters two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
