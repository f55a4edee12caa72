"""Preparing one rank's share of a batch, at growing numbers of ranks and a fixed number of rows per rank."""

from __future__ import annotations

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.chunks import USABLE
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.prepare import Preparer
from rlhf_core.data.stream import Stream
from rlhf_core.models.loading.tokenizer import load_tokenizer
from scaling_curves.curve import Measured, Ratio, Series, cpu_seconds, curve

ROWS, SHARE = 20_000, 8


@curve("ranks", f"a batch of one rank, {SHARE} rows per rank: draw, template, tokenize")
def ranks(quick: bool) -> Measured:
    """Rows of a text and an answer. The other ranks are simulated: they answer that their rows are usable."""
    text = "What is the color of the sky over a town that nobody in the world has ever heard of? "
    rows = [Example(f"{number} {text}", (f"{text}{number}",)) for number in range(ROWS // (100 if quick else 1))]
    encoder = Encoder(load_tokenizer("tiny", ModelOptions()))
    points = []
    for size in (1, 4) if quick else (1, 4, 16, 64, 256, 1024):
        stream = Stream(
            rows,
            SHARE * size,
            world_size=size,
            prepare=Preparer(encoder, online=False),
            add_up=lambda code_C: np.maximum(code_C, USABLE),  # no row of the other ranks is too long
        )
        next(stream)  # permutes the rows
        steps = 4 if quick else 16  # a few batches are prepared at once
        seconds = cpu_seconds(lambda s=stream, n=steps: [next(s) for _ in range(n)]) / steps
        points.append((size, 1000 * seconds))
    ratios = [Ratio(f"{size} ranks / 1", ms / points[0][1], 1.2) for size, ms in points if size == 64]
    return Measured([Series("a batch of rank 0", "ranks", "ms", points)], ratios)
