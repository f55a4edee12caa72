"""Tokenized rows of data: the encoder's result for an example, before rows become a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TokenizedCompletion", "TokenizedRow"]


@dataclass(frozen=True)
class TokenizedCompletion:
    """One tokenized completion."""

    text: str
    ids: list[int]
    mask: list[bool]
    """true where the loss applies: assistant turns with the token that ends them"""


@dataclass(frozen=True)
class TokenizedRow:
    """One tokenized example."""

    text: str
    """the rendered prompt"""
    ids: list[int]
    """tokens of the rendered prompt, at least one"""
    completions: tuple[TokenizedCompletion, ...] = ()
    opening: int = 0
    """number of `ids` that open the text: BOS, and in a chat everything before the first user message"""
    cut: bool = False
    """True if it was too long and is not whole"""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """model inputs for the images of the prompt, by name"""
    sizes: tuple[tuple[int, int], ...] = ()
    """width and height of each image, in pixels"""
