"""RMS norms of decoding steps as one operation each.

A step of a GPU is many small kernels, and transformers' RMS norm is six to eight of them, twice per layer. Which modules
are RMS norms is found out by their results for random weights, so that variants, such as Gemma's, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["find_norms", "fuse_norms"]


@contextmanager
def fuse_norms(norms: list[tuple[nn.Module, float]]) -> Iterator[None]:
    """Inside, the norms that `find_norms` has found are one operation each."""
    for module, eps in norms:
        module.forward = partial(_normalize, module, eps)
    try:
        yield
    finally:
        for module, _ in norms:
            del module.forward


def find_norms(model: nn.Module) -> list[tuple[nn.Module, float]]:
    """Return the modules of a model that scale by a weight and the root mean square, with the number added to its square."""
    found: list[tuple[nn.Module, float]] = []
    same: dict[tuple[type, int, float], bool] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        eps = next((vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)), None)
        lone = len([*module.parameters()]) == 1 and not [*module.buffers()] and "forward" not in vars(module)
        if weight is None or weight.dim() != 1 or not isinstance(eps, float) or not lone:
            continue
        key = type(module), len(weight), eps
        if key not in same:
            same[key] = _is_rms_norm(module, len(weight), eps)
        if same[key]:
            found.append((module, eps))
    return found


def _is_rms_norm(module: nn.Module, width: int, eps: float) -> bool:
    """Return True if a module gives what RMS norm gives, for weights and states that are random and small against eps."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return False
    draw = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 4, width, generator=draw).to(device)
    states = states * (eps**0.5)
    expected = torch.nn.functional.rms_norm(states, (width,), weight[0], eps)
    try:
        given = torch.func.functional_call(module, {"weight": weight[0]}, (states,))
    except Exception:  # a module of any model, which may need other inputs
        return False
    return (
        isinstance(given, torch.Tensor)
        and given.shape == states.shape
        and bool(torch.allclose(given.float(), expected, rtol=1e-4, atol=1e-5))
    )


def _normalize(module: Any, eps: float, *given: Tensor, **options: Any) -> Tensor:
    """Return the norm of states; as the module gives it for more inputs, or another dtype than the weight's, not fused."""
    if options or len(given) > 1 or given[0].dtype != module.weight.dtype:
        result: Tensor = type(module).forward(module, *given, **options)
        return result
    return torch.nn.functional.rms_norm(given[0], (len(module.weight),), module.weight, eps)
