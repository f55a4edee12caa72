"""A row as the model reads it: the quickest way to see a wrong template, a doubled BOS or a loss on the wrong words."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.data.rows import TokenizedRow

__all__ = ["render_row"]


def render_row(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase, image: int | None = None) -> str:
    """A row as the model reads it, special tokens included; what is trained on is green, or in « » without color.

    An image, whose tokens are `image`s, is `<image 640x480>`.
    """
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\033[32m", "\033[0m") if color else ("«", "»")
    sides = [f"--- {len(row.ids)} prompt tokens\n{_with_images(row, tokenizer, image)}"]
    for side in row.completions:
        spans = groupby(range(len(side.ids)), key=side.mask.__getitem__)
        texts = [(trained, str(tokenizer.decode([side.ids[i] for i in span]))) for trained, span in spans]
        sides.append(f"--- {len(side.ids)} completion tokens, {sum(side.mask)} trained")
        sides.append("".join(f"{on}{text}{off}" if trained else text for trained, text in texts))
    return "\n".join(sides)


def _with_images(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase, image: int | None) -> str:
    """The prompt; where an image has several runs of tokens, how many there are instead of its size."""
    runs = [(is_image, [*ids]) for is_image, ids in groupby(row.ids, lambda number: number == image)]
    several = sum(is_image for is_image, _ in runs) != len(row.sizes)
    sizes = iter(row.sizes)
    texts = []
    for is_image, ids in runs:
        what = f"{len(ids)} tokens" if several or not is_image else "{}x{}".format(*next(sizes))
        texts.append(f"<image {what}>" if is_image else str(tokenizer.decode(ids)))
    return "".join(texts)
