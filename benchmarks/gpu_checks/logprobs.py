"""Chunked log-probabilities against the plain head: the head alone, and a whole pass of the 0.5B model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gpu_checks.measure import peak_gib, profile, release, seconds
from gpu_checks.models import SHAPES, SMALL, make_role, random_batch
from rlhf_core.models.inputs.arrange import arrange_inputs

if TYPE_CHECKING:
    from gpu_checks.check import Context

__all__ = ["logprobs"]

TIME, MEMORY = 1.05, 0.25
"""Goals: times the plain head's."""


def logprobs(context: Context) -> None:
    """8k tokens, vocabularies of 32k to 152k, forward and backward in bfloat16."""
    for vocabulary in context.pick((32000, 65536, 151936), (512,)):
        found = {
            name: head(context, vocabulary, chunk)
            for name, chunk in (("plain", 0), ("chunked", context.pick(1024, 16)))
        }
        for name, (took, memory, _) in found.items():
            context.row(head_alone=name, vocabulary=vocabulary, milliseconds=1e3 * took, peak_GiB=memory)
        (plain_s, plain_gib, plain_sum), (s, gib, total) = found["plain"], found["chunked"]
        context.expect(
            f"the same sum at {vocabulary}",
            abs(total - plain_sum) <= 2e-3 * abs(plain_sum),
            f"{plain_sum:.2f}, {total:.2f}",
        )
        context.note(
            f"head alone, {vocabulary}: {s / plain_s:.2f} of the time, {gib / max(plain_gib, 1e-9):.2f} of the memory"
        )
    whole_pass(context, context.pick(151936, 512))


def head(context: Context, vocabulary: int, chunk: int) -> tuple[float, float, float]:
    """Return seconds, peak GiB and the sum of log-probabilities of one head on random states."""
    from rlhf_core.models.heads.modules import ChunkedHead

    M, H = context.pick((8192, 1536), (64, 32))
    draw = torch.Generator(context.device).manual_seed(0)
    linear = torch.nn.Linear(H, vocabulary, bias=False, device=context.device)
    torch.nn.init.normal_(linear.weight, std=0.02, generator=draw)
    module = ChunkedHead(linear, chunk=chunk)
    states_MH = torch.randn(M, H, device=context.device, dtype=torch.bfloat16, generator=draw).requires_grad_()
    targets_M = torch.randint(vocabulary, (M,), device=context.device, generator=draw)
    totals: list[float] = []

    def step() -> None:
        with torch.autocast(context.device, torch.bfloat16):
            logprobs_M: Any = module(states_MH, targets_M)[0]
        logprobs_M.sum().backward()
        totals.append(float(logprobs_M.detach().sum()))
        module.zero_grad()
        states_MH.grad = None

    took = seconds(step, rounds=context.pick(5, 1))
    memory = peak_gib(step)
    release()
    return took, memory, totals[-1]


def whole_pass(context: Context, vocabulary: int) -> None:
    """A forward and backward pass of 0.5B that ends with the body's states, with the plain head's, with the chunked one's.

    What a head needs is the peak of its pass beyond that of the body's.
    """
    lengths = [context.pick(1024, 16)] * context.pick(8, 4)
    model = SMALL if context.rehearse else f"tiny:{SHAPES['0.5B']},vocab={vocabulary},context=32768"
    batch = random_batch(lengths, context.pick(vocabulary, 200))
    role = make_role(context, model, actor={"gradient_checkpointing": True})
    head = role.causal_lm.get_output_embeddings()
    found: dict[str, tuple[float, float]] = {}
    for name, chunk in (("body", 0), ("plain", 0), ("chunked", context.pick(1024, 16))):
        head.chunk = chunk
        step = partial(forward_and_backward, role, batch, name == "body")
        found[name] = seconds(step, rounds=context.pick(3, 1)), peak_gib(step)
        context.row(whole_pass=name, vocabulary=vocabulary, milliseconds=1e3 * found[name][0], peak_GiB=found[name][1])
        release()
    (_, body), (plain_s, plain_gib), (s, gib) = (found[name] for name in ("body", "plain", "chunked"))
    met = context.goal(
        f"pass with chunked head, time by the plain one's, vocabulary {vocabulary}", s / plain_s, TIME, False
    )
    share = (gib - body) / max(plain_gib - body, 1e-9)
    context.goal(f"chunked head, memory by the plain one's, vocabulary {vocabulary}", share, MEMORY, False)
    if not met:
        context.profile("a pass with the chunked head", profile(step))


def forward_and_backward(role: Any, batch: Any, body_alone: bool) -> None:
    """Differentiate the log-probabilities of a batch, or the states that they are computed from."""
    inputs = arrange_inputs(batch).to(role.trainable.device)
    with torch.autocast(role.trainable.device.type, torch.bfloat16):
        if body_alone:
            loss = role.module.states_of(inputs).float().square().mean()
        else:
            loss = -role.module(inputs, frozenset({"logprobs_NT"}))["logprobs_NT"].mean()
    loss.backward()
    role.module.zero_grad(set_to_none=True)
