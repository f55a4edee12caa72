"""Assembling rollouts: what a token costs from the engine's arrays to a batch, and what it holds beside the batch."""

from __future__ import annotations

import torch

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.rollout.assemble import assemble
from rlhf_core.rollout.fake import Letters
from scaling_curves.curve import Measured, Ratio, Series, cost_of, cpu_seconds, curve, in_process

SAMPLES, GROUP = 1024, 8
BEFORE = 700.0
"""Nanoseconds of a token on 21 November 2026, the engine's letters included."""


class Numbers(Letters):
    """A tokenizer whose texts cost nothing: those of a real one are its own cost."""

    def batch_decode(self, sequences: object, **options: object) -> list[str]:
        """Return texts without reading the tokens."""
        return [""] * len(list(sequences))  # type: ignore[call-overload]


def sampled(tokens: int) -> tuple[Prompts, list[torch.Tensor], list[torch.Tensor]]:
    """Return prompts, and tokens and log-probabilities as an engine has them: lengths from 1 to `tokens`, evenly."""
    lengths = [1 + i * 7919 % tokens for i in range(SAMPLES)]
    rows = [1 + torch.arange(length) % 26 for length in lengths]
    prompts = SAMPLES // GROUP
    asked = Prompts(["p"] * prompts, [[1, 2, 3]] * prompts, [Example("p")] * prompts, list(range(prompts)))
    return asked, rows, [-row.float() for row in rows]


def put_together(prompts: Prompts, rows: list[torch.Tensor], logprobs: list[torch.Tensor]) -> Rollouts:
    """Return the batch."""
    per_token = {"sampler_logprobs_NT": logprobs}
    return assemble(prompts, rows, ["length"] * SAMPLES, Numbers(), per_token=per_token)  # type: ignore[arg-type]


def memory_of(tokens: int) -> float:
    """Return the bytes that assembling takes at its peak, over those of the batch's own tensors."""
    arrays = sampled(tokens)
    batch = put_together(*arrays)
    held = [batch.tokens_NT, batch.mask_NT, *batch.extras.values()]
    own = sum(each.numel() * each.element_size() for each in held)
    del batch, held
    return cost_of(put_together, *arrays).memory / own


@curve("assembling", f"{SAMPLES} completions become a batch: arrays, masks, padding; texts left out")
def assembling(quick: bool) -> Measured:
    """CPU nanoseconds of a token, and memory over that of the batch itself."""
    sizes = (16, 64) if quick else (64, 256, 1024, 4096)
    points = []
    for tokens in sizes:
        arrays = sampled(tokens)
        count = sum(map(len, arrays[1]))
        points.append((tokens, 1e9 * cpu_seconds(lambda a=arrays: put_together(*a), 5) / count))
    ratios = [
        Ratio(f"ns of a token at {sizes[-1]} tokens, over {BEFORE:.0f} before", points[-1][1] / BEFORE, 0.1),
        Ratio("memory over the batch's own", memory_of(16) if quick else in_process(memory_of, 4096), 1.5),
    ]
    return Measured([Series("a token", "tokens", "ns", points)], ratios)
