"""The chunked log-probabilities against a float64 softmax written out here, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_core.models.heads import logprobs
from rlhf_core.models.heads.logprobs import full_logprobs, token_logprobs


def problem(M: int, V: int, H: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random states, weight, bias and targets; numbers are exactly representable in `dtype`."""
    draw = torch.Generator().manual_seed(seed)
    normal = {
        name: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
        for name, shape in {"hidden_MH": (M, H), "weight_VH": (V, H), "bias_V": (V,)}.items()
    }
    return {**normal, "targets_M": torch.randint(0, V, (M,), generator=draw)}


def reference(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    targets_M: Tensor,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one row at a time, in float64."""
    logprobs, entropies = [], []
    for hidden, target in zip(hidden_MH.double(), targets_M.tolist(), strict=True):
        logits = weight_VH.double() @ hidden * scale + (0.0 if bias_V is None else bias_V.double() * scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        probs = torch.exp(logits / temperature)
        probs = probs / probs.sum()
        logprobs.append(probs[target].log())
        entropies.append(-(probs * probs.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(
    values: tuple[Tensor, Tensor | None], weights: tuple[Tensor, Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    """Gradients of a weighted sum of log-probabilities and entropies."""
    total = sum((weight * value).sum() for weight, value in zip(weights, values, strict=True) if value is not None)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"scale": 0.0625}, {"softcap": 2.0}, {"temperature": 1.3, "scale": 2.0, "softcap": 1.5}],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_the_definition(
    chunk: int, entropy: bool, options: dict[str, float], biased: bool
) -> None:
    """Whatever the block size; 13 tokens of vocabulary do not divide into equal blocks."""
    given = problem(M=7, V=13, H=5)
    bias = given["bias_V"].requires_grad_() if biased else None
    hidden, weight, targets = (
        given["hidden_MH"].requires_grad_(),
        given["weight_VH"].requires_grad_(),
        given["targets_M"],
    )
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    ours = token_logprobs(hidden, weight, targets, bias_V=bias, chunk=chunk, entropy=entropy, **options)
    theirs = reference(hidden, weight, targets, bias, **options)
    torch.testing.assert_close(ours[0], theirs[0])
    assert (ours[1] is not None) == entropy
    if entropy:
        torch.testing.assert_close(ours[1], theirs[1])
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(7, generator=draw).double(), torch.randn(7, generator=draw).double() * entropy
    for mine, true in zip(gradients(ours, weights, inputs), gradients(theirs, weights, inputs), strict=True):
        torch.testing.assert_close(mine, true)


def test_finite_differences_agree() -> None:
    """A second, wholly numerical account of the gradient, with everything switched on."""
    given = problem(M=3, V=5, H=4)
    inputs = tuple(given[name].requires_grad_() for name in ("hidden_MH", "weight_VH", "bias_V"))

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return token_logprobs(
            hidden, weight, given["targets_M"], bias_V=bias, temperature=0.8, softcap=3.0, chunk=1, entropy=True
        )

    assert torch.autograd.gradcheck(function, inputs)


@settings(deadline=None, max_examples=50)
@given(M=st.integers(0, 9), V=st.integers(1, 17), chunk=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_block_size_never_matters(M: int, V: int, chunk: int, seed: int) -> None:
    """Also for no rows at all, and for a vocabulary of one."""
    given = problem(M, V, 4, seed)
    inputs = [given[name].requires_grad_() for name in ("hidden_MH", "weight_VH", "bias_V")]
    hidden, weight, bias = inputs
    results = []
    for size in (0, chunk):
        values = token_logprobs(hidden, weight, given["targets_M"], bias_V=bias, chunk=size, entropy=True)
        results.append([*values, *gradients(values, (torch.ones(M), torch.ones(M)), inputs)])
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_float32_near_the_exact_numbers(dtype: torch.dtype) -> None:
    """The matrix product is rounded to the weights' precision, the softmax is not."""
    given = problem(M=32, V=101, H=16, dtype=dtype)
    hidden, weight = given["hidden_MH"].requires_grad_(), given["weight_VH"].requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, given["targets_M"], chunk=5, entropy=True)
    assert logprobs.dtype == torch.float32
    exact, exact_entropy = reference(hidden, weight, given["targets_M"])
    rounding = 16 * torch.finfo(dtype).eps  # logits reach 16 here
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=rounding)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=0, atol=rounding)  # type: ignore[union-attr]
    grads = torch.autograd.grad(logprobs.sum(), [hidden, weight])
    true = torch.autograd.grad(exact.sum(), [hidden, weight])
    for mine, theirs in zip(grads, true, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() / theirs.norm() < 4 * torch.finfo(dtype).eps


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients() -> None:
    """Master weights are float32; the result is that of weights and states rounded to bfloat16."""
    given = problem(M=16, V=50, H=8, dtype=torch.float32)
    hidden, weight = given["hidden_MH"].requires_grad_(), given["weight_VH"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, given["targets_M"], chunk=3)
    rounded, _ = token_logprobs(hidden.bfloat16(), weight.bfloat16(), given["targets_M"], chunk=3)
    torch.testing.assert_close(logprobs, rounded, rtol=0, atol=0)
    grad_hidden, grad_weight = torch.autograd.grad(logprobs.sum(), [hidden, weight])
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32


def test_huge_logits_and_impossible_tokens_do_not_overflow() -> None:
    """A logit of a hundred thousand is a certainty; one of minus infinity never happens."""
    hidden = torch.tensor([[1e5, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, float("-inf")])
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([0]), bias_V=bias, chunk=1)
    assert logprobs.item() == 0.0
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(grad, torch.zeros(1, 2))


@pytest.mark.parametrize("chunk", [0, 1, 1000])
@pytest.mark.parametrize("inputs", [["hidden_MH", "weight_VH"], []], ids=["trained", "frozen"])
def test_tokens_that_cannot_be_drawn_leave_everything_else_as_it_is_without_them(chunk: int, inputs: list[str]) -> None:
    """A bias of -inf takes a token away: numbers and gradients are those of the smaller vocabulary, its own are zero."""
    data = problem(6, 9, 4, dtype=torch.float32)
    left = torch.tensor([v for v in range(9) if v not in (2, 8)])
    data["targets_M"] = left[data["targets_M"] % 7]
    data["bias_V"][[2, 8]] = -torch.inf
    smaller = {**data, "weight_VH": data["weight_VH"][left], "bias_V": data["bias_V"][left]}
    smaller["targets_M"] = torch.searchsorted(left, data["targets_M"])
    found = []
    for problem_ in (data, smaller):
        for name in inputs:
            problem_[name].requires_grad_()
        logprobs_M, entropy_M = token_logprobs(**problem_, chunk=chunk, entropy=True)
        assert entropy_M is not None
        leaves = [problem_[name] for name in inputs]
        found.append(
            [logprobs_M, entropy_M, *(torch.autograd.grad((logprobs_M + entropy_M).sum(), leaves) if inputs else ())]
        )
    if inputs:
        assert not found[0][3][[2, 8]].any()
        found[0][3] = found[0][3][left]
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=1e-5)


def test_without_gradients_the_numbers_are_the_same() -> None:
    given = problem(M=6, V=11, H=3)
    inputs = given["hidden_MH"], given["weight_VH"].requires_grad_(), given["targets_M"]
    live = token_logprobs(*inputs, chunk=2, entropy=True)
    with torch.no_grad():
        still = token_logprobs(*inputs, chunk=2, entropy=True)
    for a, b in zip(live, still, strict=True):
        assert a is not None
        assert b is not None
        assert a.requires_grad
        assert not b.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_second_backward_pass_gives_the_same_gradient() -> None:
    """The first one overwrites the probabilities that the forward pass left in the buffer."""
    given = problem(M=6, V=11, H=3)
    hidden = given["hidden_MH"].requires_grad_()
    logprobs, _ = token_logprobs(hidden, given["weight_VH"], given["targets_M"], chunk=2)
    first, second = (torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_a_second_derivative_is_refused() -> None:
    given = problem(M=6, V=11, H=3)
    hidden = given["hidden_MH"].requires_grad_()
    logprobs, _ = token_logprobs(hidden, given["weight_VH"], given["targets_M"], chunk=2)
    (grad,) = torch.autograd.grad((logprobs * hidden.sum()).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_plain_path_is_the_default_of_the_reference() -> None:
    given = problem(M=4, V=9, H=3)
    ours, _ = full_logprobs(given["hidden_MH"], given["weight_VH"], given["targets_M"])
    torch.testing.assert_close(ours, reference(given["hidden_MH"], given["weight_VH"], given["targets_M"])[0])


# ----------------------------------------------------------------------------------------------------------------------
# what it costs
# ----------------------------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += [each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


def largest(chunk: int, weight_trained: bool = True, **options: Any) -> int:
    """The largest tensor that a forward and backward pass over 64 rows and a vocabulary of 1000 makes."""
    given = problem(M=64, V=1000, H=4, dtype=torch.float32)
    hidden, weight = given["hidden_MH"].requires_grad_(), given["weight_VH"].requires_grad_(weight_trained)
    with Sizes() as sizes:
        logprobs, entropy = token_logprobs(hidden, weight, given["targets_M"], chunk=chunk, **options)
        (logprobs + (0.0 if entropy is None else entropy)).sum().backward()
    assert (weight.grad is not None) == weight_trained
    return max(sizes.elements)


@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 5.0}, {"temperature": 0.5}], ids=str)
def test_no_tensor_exceeds_the_rows_asked_for(options: dict[str, Any]) -> None:
    """8 of 64 rows: 8000 logits at a time, where the plain path makes all 64000."""
    assert largest(chunk=8, **options) <= 8 * 1000
    assert largest(chunk=0, **options) == 64 * 1000


@pytest.mark.parametrize(("rows", "widest"), [(4, 1280), (5, 1000), (64, 79)])
def test_large_blocks_are_aligned(rows: int, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,999 tokens: 4 blocks of 1,250 become 1,280, 5 of 1,000 stay, and 64 of 79 stay too."""
    seen: list[int] = []
    blocks = logprobs._blocks
    monkeypatch.setattr(logprobs, "_blocks", lambda V, block: (seen.append(block), blocks(V, block))[1])
    hidden_MH, weight_VH = torch.randn(rows, 2), torch.randn(4999, 2)
    found, _ = token_logprobs(hidden_MH, weight_VH, torch.arange(rows) * 3, chunk=1)
    expected, _ = full_logprobs(hidden_MH, weight_VH, torch.arange(rows) * 3)
    torch.testing.assert_close(found, expected)
    assert seen == [widest]


def test_a_frozen_weight_costs_no_weight_gradient() -> None:
    """With one row's worth of logits the 4000 numbers of the weight are the largest tensor, and only if trained."""
    assert largest(chunk=1, weight_trained=True) == 4 * 1000
    assert largest(chunk=1, weight_trained=False) == 64 * 16  # 63 blocks of 16 tokens: the buffer
