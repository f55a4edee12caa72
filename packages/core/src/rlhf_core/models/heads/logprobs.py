"""Log-probabilities and entropies of tokens without ever holding the `[M, V]` logits.

The language-model head and the log-softmax run over a block of the vocabulary at a time, for all rows, with a running
log-sum-exp; only M numbers leave the forward pass. The backward pass computes the logits again, block by block, in the
one buffer that the forward pass used, and that still holds the probabilities of the last block: a batch that fits one
block is never recomputed. Blocks of the vocabulary and not of the rows, because a block of the head's weight is then read
once, its gradient is written once, and what is accumulated is `[M, H]`. On the CPU it is faster than the plain path: the
buffer stays near the caches, and no page of a multi-gigabyte tensor has to be mapped (`benchmarks/logprobs.py`).

The softmax is taken in float32 (float64 for float64 inputs), whatever the dtype of the matrix products, which is that of
autocast where it is on and of the weight otherwise. A frozen weight costs no weight gradient.

Left out on purpose: second derivatives (an error), label smoothing, and vocabularies sharded over devices.

Shape letters: M rows (completion tokens of a batch), H hidden, V vocabulary, B block of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["CPU_LOGITS", "Head", "full_logprobs", "token_logprobs"]

CPU_LOGITS = 2**24
"""Most logits held at a time on the CPU, 64 MiB of float32: 16 MiB to 256 MiB took the same time within 10 %."""

ALIGNED = 64
"""Large blocks of the vocabulary are multiples of this: with others, an H200 took slow kernels for unaligned matrices."""

LOWEST = -1e4
"""Substitute for a log-probability of -inf in p log p: exp of it is 0 even in float64, and 0 times it is not nan."""


@dataclass(frozen=True)
class Head:
    """Map from hidden states to logits: `cap(scale * (hidden weight^T + bias)) / temperature`."""

    temperature: float = 1.0
    """divides the logits"""
    scale: float = 1.0
    """multiplies the raw logits (Cohere's `logit_scale`, the reciprocal of Granite's `logits_scaling`)"""
    softcap: float | None = None
    """cap(x) = softcap * tanh(x / softcap), as in Gemma 2; None for none"""

    @property
    def inner_scale(self) -> float:
        """Return the factor of the raw products, before the tanh if there is one."""
        return self.scale / (self.softcap or self.temperature)

    @property
    def outer_scale(self) -> float:
        """Return the factor of the tanh."""
        return self.softcap / self.temperature if self.softcap else 1.0

    def to_logits(self, raw_MV: Tensor) -> Tensor:
        """Logits from raw products, float32 (float64 for float64), with autograd."""
        z_MV = raw_MV.to(_softmax_dtype(raw_MV.dtype))
        if self.inner_scale != 1.0:
            z_MV = z_MV * self.inner_scale
        return z_MV.tanh() * self.outer_scale if self.softcap else z_MV

    def logits(self, buffer: Tensor, hidden_MH: Tensor, weight_BH: Tensor, bias_B: Tensor | None) -> Tensor:
        """The logits of a block (M, B), written into the flat `buffer`. No autograd."""
        M, B = len(hidden_MH), len(weight_BH)
        z_MB = buffer[: M * B].view(M, B)
        _matmul_into(z_MB, hidden_MH, weight_BH.t())
        if bias_B is not None:
            z_MB.add_(bias_B)
        if self.inner_scale != 1.0:
            z_MB.mul_(self.inner_scale)
        return z_MB.tanh_().mul_(self.outer_scale) if self.softcap else z_MB


def token_logprobs(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    targets_M: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 1024,
    most: int = 0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy of the distribution it was drawn from if asked for.

    Args:
        hidden_MH: states that predict the targets.
        weight_VH: the head's weight.
        targets_M: int64 token ids.
        bias_V: the head's bias.
        temperature, scale, softcap: see `Head`.
        chunk: rows' worth of logits held at a time (`chunk * V` numbers, fewer on the CPU); 0 holds all.
        most: logits held at a time at most; 0 takes `CPU_LOGITS` on the CPU and sets no limit elsewhere.
        entropy: whether the entropy is wanted too.

    Returns:
        Log-probabilities (M,) and entropies (M,) or None: float32, float64 for float64 inputs.
    """
    head = Head(temperature, scale, softcap)
    if chunk == 0:
        return full_logprobs(hidden_MH, weight_VH, targets_M, bias_V=bias_V, head=head, entropy=entropy)
    V = len(weight_VH)
    held = min(chunk * V, most or (CPU_LOGITS if weight_VH.device.type == "cpu" else chunk * V))
    block = -(-V // max(1, -(-V * len(hidden_MH) // held)))  # equal blocks: the last one is not computed again
    if block >= 16 * ALIGNED:  # a few numbers more than were asked for
        block = min(V, -(-block // ALIGNED) * ALIGNED)
    dtype = _matmul_dtype(weight_VH)
    inputs = [tensor for tensor in (hidden_MH, weight_VH, bias_V) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        logprobs_M, entropy_M = _BlockwiseLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_MH, weight_VH, bias_V, targets_M, head, block, dtype, entropy
        )
        return logprobs_M, entropy_M
    sweep = _sweep(hidden_MH, weight_VH, bias_V, targets_M, head, block, dtype, entropy)
    return sweep.picked_M - sweep.logsum_M, sweep.entropy_M


def full_logprobs(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    targets_M: Tensor,
    *,
    bias_V: Tensor | None = None,
    head: Head | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The plain path: all logits at once, differentiated by autograd. What `chunk=0` means, and what tests compare with."""
    head = head or Head()
    raw_MV = torch.nn.functional.linear(hidden_MH.to(weight_VH.dtype), weight_VH, bias_V)
    logprobs_MV = head.to_logits(raw_MV).log_softmax(-1)
    picked_M = logprobs_MV.gather(1, targets_M[:, None]).squeeze(1)
    return picked_M, -(logprobs_MV.exp() * logprobs_MV.clamp(min=LOWEST)).sum(-1) if entropy else None


# ----------------------------------------------------------------------------------------------------------------------
# the blocked path
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class _Sweep:
    """Results of one pass over the vocabulary."""

    picked_M: Tensor
    """the targets' logits"""
    logsum_M: Tensor
    """log-sum-exp of the logits"""
    total_M: Tensor
    """sum of exp(logit - peak)"""
    entropy_M: Tensor | None
    buffer: Tensor
    """flat; holds exp(logit - peak) of the last block"""


def _sweep(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    head: Head,
    block: int,
    dtype: torch.dtype,
    entropy: bool,
) -> _Sweep:
    """One pass over the vocabulary with a running peak, sum and (for the entropy) weighted sum."""
    M, V = len(hidden_MH), len(weight_VH)
    buffer = hidden_MH.new_empty(M * block, dtype=_softmax_dtype(dtype))
    peak_M = buffer.new_full((M,), torch.finfo(buffer.dtype).min)  # finite, so that 0 * (peak - peak') is not nan
    picked_M, total_M, weighted_M = (buffer.new_zeros(M) for _ in range(3))
    with torch.no_grad(), torch.autocast(buffer.device.type, enabled=False):
        hidden_MH = hidden_MH.to(dtype)
        for part in _blocks(V, block):
            z_MB = head.logits(buffer, hidden_MH, weight_VH[part].to(dtype), None if bias_V is None else bias_V[part])
            column_M1, here_M = _locate(targets_M, part)
            picked_M += torch.where(here_M, z_MB.gather(1, column_M1).squeeze(1), 0.0)
            risen_M = torch.maximum(peak_M, z_MB.amax(1))
            shift_M, peak_M = peak_M - risen_M, risen_M
            z_MB.sub_(peak_M[:, None])
            if entropy:
                exp_MB = z_MB.clamp_(min=LOWEST).exp()
                weighted_M = shift_M.exp() * (weighted_M + shift_M * total_M) + z_MB.mul_(exp_MB).sum(1)
            else:
                exp_MB = z_MB.exp_()
            total_M = shift_M.exp() * total_M + exp_MB.sum(1)
        entropy_M = total_M.log() - weighted_M / total_M if entropy else None
    return _Sweep(picked_M, peak_M + total_M.log(), total_M, entropy_M, buffer)


class _BlockwiseLogprobs(torch.autograd.Function):
    """`token_logprobs` with a backward pass that computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        head: Head,
        block: int,
        dtype: torch.dtype,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        sweep = _sweep(hidden_MH, weight_VH, bias_V, targets_M, head, block, dtype, entropy)
        ctx.save_for_backward(hidden_MH, weight_VH, bias_V, targets_M, sweep.logsum_M, sweep.entropy_M)
        ctx.head, ctx.block, ctx.dtype = head, block, dtype
        # the gradients of an entropy or a soft cap need more than the last block's probabilities
        ctx.kept = None if entropy or head.softcap else (sweep.buffer, sweep.total_M)
        ctx.set_materialize_grads(False)
        return sweep.picked_M - sweep.logsum_M, sweep.entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_M: Tensor | None, grad_entropy_M: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, bias_V, targets_M, logsum_M, entropy_M = ctx.saved_tensors
        head, dtype, block, V = ctx.head, ctx.dtype, ctx.block, len(weight_VH)
        kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward pass recomputes the last block too
        buffer = logsum_M.new_empty(len(hidden_MH) * block) if kept is None else kept[0]
        g_M = torch.zeros_like(logsum_M) if grad_logprobs_M is None else grad_logprobs_M
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_MH = torch.zeros_like(hidden_MH, dtype=buffer.dtype) if needs_hidden else None
        grad_weight_VH = torch.empty_like(weight_VH) if needs_weight else None  # each block is written once
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
        with torch.autocast(buffer.device.type, enabled=False):
            low_MH = hidden_MH.to(dtype)
            for part in reversed(_blocks(V, block)):
                weight_BH = weight_VH[part].to(dtype)
                if kept is not None and part.stop == V:
                    grad_MB = buffer[: len(low_MH) * len(weight_BH)].view(len(low_MH), len(weight_BH))
                    grad_MB.mul_((-g_M / kept[1])[:, None])
                    slope_MB = None
                else:
                    grad_MB = head.logits(buffer, low_MH, weight_BH, None if bias_V is None else bias_V[part])
                    slope_MB = _tanh_slope(grad_MB / head.outer_scale) if head.softcap else None
                    _logits_to_gradient(grad_MB, logsum_M, g_M, entropy_M, grad_entropy_M)
                column_M1, here_M = _locate(targets_M, part)
                grad_MB.scatter_add_(1, column_M1, (g_M * here_M)[:, None])
                _scale_(grad_MB, head.inner_scale * head.outer_scale, slope_MB)
                low_MB = grad_MB.to(dtype)
                if grad_hidden_MH is not None:
                    _add_matmul(grad_hidden_MH, low_MB, weight_BH)
                if grad_weight_VH is not None:
                    _matmul_into(grad_weight_VH[part], low_MB.t(), low_MH)
                if grad_bias_V is not None:
                    grad_bias_V[part] = grad_MB.sum(0)
        if grad_hidden_MH is not None:
            grad_hidden_MH = grad_hidden_MH.to(hidden_MH.dtype)
        return grad_hidden_MH, grad_weight_VH, grad_bias_V, *(None,) * 5


def _logits_to_gradient(
    z_MB: Tensor, logsum_M: Tensor, g_M: Tensor, entropy_M: Tensor | None, e_M: Tensor | None
) -> None:
    """Overwrite logits with the gradient of `g logp + e entropy` but for the target's own term.

    d logp_t / dz = 1[t] - p and d entropy / dz = -p (log p + entropy).
    """
    z_MB.sub_(logsum_M[:, None])
    if e_M is None or entropy_M is None:
        z_MB.exp_().mul_(-g_M[:, None])
        return
    probs_MB = z_MB.clamp_(min=LOWEST).exp()
    z_MB.add_(entropy_M[:, None]).mul_(e_M[:, None]).add_(g_M[:, None]).mul_(probs_MB.neg_())


def _tanh_slope(tanh_MB: Tensor) -> Tensor:
    """The derivative of tanh where it has these values, 1 - tanh^2; overwrites them."""
    return tanh_MB.square_().neg_().add_(1.0)


def _scale_(grad_MB: Tensor, gain: float, slope_MB: Tensor | None) -> None:
    """From the gradient of the logits to that of the raw matrix product, in place."""
    if slope_MB is not None:
        grad_MB.mul_(slope_MB)
    if gain != 1.0:
        grad_MB.mul_(gain)


def _blocks(V: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, V)) for start in range(0, V, block)]


def _locate(targets_M: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in the block (M, 1), any column where it is elsewhere, and whether it is here (M,)."""
    column_M = targets_M - part.start
    width = part.stop - part.start
    return column_M.clamp(0, width - 1)[:, None], (column_M >= 0) & (column_M < width)


def _matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out = a b`, converting where the dtypes differ."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a b`, converting where the dtypes differ."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype if it is on, else the weight's dtype."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
