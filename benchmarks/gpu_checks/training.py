"""The training step: the loop's own `LocalRole.train`, from a batch on the CPU to updated weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gpu_checks.measure import peak_gib, profile, release, seconds, timed
from gpu_checks.models import make_role, model_flops, random_batch, shape

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["mixed_lengths", "optimizer", "training", "training_compiled", "training_small"]

MFU = 0.40
"""Goal: share of the measured matrix-product rate, recomputation not counted."""


def training(context: Context) -> None:
    """1.5B with gradient checkpointing: rows of mixed lengths packed into 8k tokens, then rows of 8k, then of 2k."""
    context.note(
        "MFU = (6 parameters + 6 layers x heads x head size x (S + 1)) a token of a row of S, by seconds, by the measured "
        "matrix-product rate; the embedding look-up and what gradient checkpointing computes again are not counted. The "
        "column `with recomputation` counts the layers' second forward pass. A step is forward, backward, clipping, AdamW."
    )
    mixed = mixed_lengths(context.pick(8192, 64), context.pick(4, 2))
    micro, large = context.pick(8192, 64), context.pick(32768, 128)
    eights = [context.pick(8192, 64)] * context.pick(4, 2)
    cases = [
        Case("mixed lengths to 8k", mixed, micro),
        Case("mixed lengths to 8k", mixed, large),
        Case("rows of 8k", eights, micro),
        Case("rows of 8k", eights, large),
        Case("rows of 2k", [context.pick(2048, 16)] * context.pick(16, 4), micro),
    ]
    measure(context, "1.5B", cases)


def training_compiled(context: Context) -> None:
    """1.5B with `--actor.compile`, whose first step compiles, in passes of 32k tokens and of 8k."""
    mixed, eights = (
        mixed_lengths(context.pick(8192, 64), context.pick(4, 2)),
        [context.pick(8192, 64)] * context.pick(4, 2),
    )
    micro, large = context.pick(8192, 64), context.pick(32768, 128)
    cases = [
        Case("rows of 8k", eights, large, goal=True),
        Case("mixed lengths to 8k", mixed, large, goal=True),
        Case("mixed lengths to 8k", mixed, micro),
    ]
    measure(context, "1.5B", cases, compile=not context.rehearse)


def training_small(context: Context) -> None:
    """0.5B, the same, and without gradient checkpointing."""
    cases = [
        Case("mixed lengths to 8k", mixed_lengths(context.pick(8192, 64), context.pick(4, 2)), context.pick(8192, 64)),
        Case("rows of 2k", [context.pick(2048, 16)] * context.pick(16, 4), context.pick(8192, 64)),
    ]
    measure(context, "0.5B", cases)
    release()
    measure(context, "0.5B", cases, gradient_checkpointing=False)


def mixed_lengths(tokens: int, batches: int) -> list[int]:
    """Return lengths of rows, log-normal with a median of a sixteenth of `tokens`, that fill so many micro-batches of them."""
    draw = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    for _ in range(batches):
        left = tokens
        while left:
            length = min(left, max(4, int(tokens / 16 * torch.randn((), generator=draw).mul(0.8).exp())))
            length = left if left - length < 4 else length
            lengths.append(length)
            left -= length
    return lengths


@dataclass(frozen=True)
class Case:
    """A batch to train on."""

    rows: str
    """what rows it has"""
    lengths: Sequence[int]
    """tokens of each"""
    micro_tokens: int
    """budget of a micro-batch"""
    goal: bool = False
    """whether the goal is about it"""


def measure(context: Context, size: str, cases: Sequence[Case], **options: Any) -> None:
    """Time a step of each case; judge the one that is the goal, and profile a micro-batch of it where it falls short."""
    actor = {"gradient_checkpointing": True, **options}
    role = make_role(context, shape(context, size), actor=actor)
    vocabulary, checkpointing = role.causal_lm.config.vocab_size, actor["gradient_checkpointing"]
    how = ", compiled" if options.get("compile") else ""
    for case in cases:
        role.budget.tokens = case.micro_tokens
        step = partial(role.train, {"data": random_batch(case.lengths, vocabulary)})
        first = timed(step)
        memory = peak_gib(step)
        took = seconds(step, rounds=context.pick(3, 1), warm=0)
        rate = took * context.limits.get("flops", float("inf"))
        mfu, worked = (model_flops(role.causal_lm, case.lengths, each) / rate for each in (False, checkpointing))
        context.row(
            model=f"{size}{how}", rows=case.rows, micro_tokens=case.micro_tokens, packed=role.module.packs,
            recomputation=checkpointing, tokens_per_step=sum(case.lengths), seconds=took, first_step=first,
            tokens_per_second=sum(case.lengths) / took, MFU=mfu, with_recomputation=worked, peak_GiB_above_weights=memory,
        )  # fmt: skip
        if case.goal:
            met = context.goal(f"training MFU at {size}{how}, {case.rows}, packed", mfu, MFU)
            if not met or context.rehearse:
                few = mixed_lengths(case.micro_tokens, 1)
                one = partial(role.train, {"data": random_batch(few, vocabulary)})
                context.profile(f"a step of one micro-batch, {size}{how}, {case.rows}", profile(one))


def optimizer(context: Context) -> None:
    """AdamW and clipping at 1.5B: seconds of the strategy's `step` against reading and writing what it must."""
    role = make_role(context, shape(context, "1.5B"))
    trainable = role.trainable
    numbers = sum(each.numel() for each in trainable.module.parameters())

    def step() -> None:
        for parameter in trainable.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainable.step()

    def gradients() -> None:
        for parameter in trainable.module.parameters():
            parameter.grad = torch.zeros_like(parameter)

    took = seconds(step) - seconds(gradients)
    moved = (
        numbers * 4 * (1 + 2 + 7)
    )  # norm reads the gradient; clipping reads and writes it; AdamW reads 4 and writes 3
    bound = moved / context.limits.get("bytes", float("inf"))
    context.row(parameters=float(numbers), milliseconds=1e3 * took, bound_milliseconds=1e3 * bound, share=bound / took)
    context.note("the bound: 40 bytes a parameter (norm 4, clipping 8, AdamW 28) at the copy rate measured above")
