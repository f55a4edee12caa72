"""A model's layers compiled with `torch.compile`, for passes that are differentiated.

Small kernels between the matrix products (normalization, rotary embedding, activation, casts of autocast) are fused, and a
pass calls fewer of them: on a GPU the calls of a small model take longer than the kernels. Layers of one shape share one
compilation (dynamic in the number of tokens). Attention over packed rows stays as it is, between two compiled parts.

Passes without gradient, and so sampling, use the layers as they were: shapes there change with every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["compile_layers"]


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of a transformers model, in place.

    Raises:
        UsageError: the model has no layers that transformers can compute again, by which they are found.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    from rlhf_core.errors import UsageError
    from rlhf_core.models.inputs import packed_attention

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"the layers of {type(model).__name__} cannot be compiled one by one; leave compile off")
    packed_attention.register(torch.compiler.disable(packed_attention.packed_attention))
    for layer in layers:
        layer._compiled_call_impl = _LayerCall(layer)


class _LayerCall:
    """A layer's call: compiled where a gradient is wanted, the layer's own otherwise."""

    def __init__(self, layer: nn.Module) -> None:
        self._plain = layer._call_impl
        self._compiled = torch.compile(layer._call_impl, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if torch.is_grad_enabled() else self._plain)(*args, **kwargs)
