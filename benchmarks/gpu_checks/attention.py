"""Rows end to end against padded rows: the same log-probabilities and gradients, and the time of a pass."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gpu_checks.measure import release, seconds
from gpu_checks.models import make_role, random_batch, shape
from gpu_checks.training import mixed_lengths
from rlhf_core.models.inputs.arrange import arrange_inputs

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["attention"]

WANTS = frozenset({"logprobs_NT"})

NAMES = ("sdpa", "eager", "varlen", "flash_attention_2", "flash_attention_3")
"""Implementations that are tried; what is not there is noted."""

TOLERANCE = 0.06
"""Of a log-probability: bfloat16 rounds logits of 8 to 0.03."""


def attention(context: Context) -> None:
    """Every attention implementation that works here, packed where it packs, on rows of mixed lengths (8k tokens, 0.5B)."""
    lengths = mixed_lengths(context.pick(8192, 128), 1)
    batch: Any = None
    expected: tuple[torch.Tensor, float] | None = None
    for name in NAMES:
        for packing in (False, True):
            try:
                role = make_role(
                    context, shape(context, "0.5B"), micro_tokens=10**6,
                    actor={"attention": name, "packing": packing, "gradient_checkpointing": True},
                )  # fmt: skip
            except Exception as error:  # what is not installed here is no failure of ours
                context.note(f"`{name}`, {_word(packing)}: {str(error).splitlines()[0]}"[:300])
                continue
            if packing and not role.module.packs:
                context.note(f"`{name}` does not pack here")
                continue
            batch = batch or random_batch(lengths, role.causal_lm.config.vocab_size)
            found = passes(role, batch)
            took = seconds(partial(passes, role, batch), rounds=context.pick(3, 1))
            cells = sum(lengths) if role.module.packs else len(lengths) * max(lengths)
            context.row(
                attention=name, packed=role.module.packs, rows=len(lengths), cells=cells, milliseconds=1e3 * took
            )
            expected = expected or found
            largest = float((found[0] - expected[0]).abs().max())
            seen = (
                f"log-probabilities differ by at most {largest:.4f}; gradient norms {found[1]:.5f}, {expected[1]:.5f}"
            )
            same = largest <= TOLERANCE and abs(found[1] - expected[1]) <= 0.05 * expected[1]
            context.expect(f"{name}, {_word(packing)}: as the first row of the table", same, seen)
            del role
            release()


def passes(role: Any, batch: Any) -> tuple[torch.Tensor, float]:
    """Return the log-probabilities of a batch, on the CPU, and the norm of the gradient of their mean."""
    inputs = arrange_inputs(batch).to(role.trainable.device)
    with torch.autocast(role.trainable.device.type, torch.bfloat16):
        logprobs_NT = role.module(inputs, WANTS)["logprobs_NT"]
    logprobs_NT.mean().backward()
    grads = [each.grad for each in role.module.parameters() if each.grad is not None]
    norm = float(torch.stack([grad.float().norm() for grad in grads]).norm())
    role.module.zero_grad(set_to_none=True)
    return logprobs_NT.detach().float().cpu(), norm


def _word(packing: bool) -> str:
    return "packed" if packing else "padded"
