"""A method that vLLM's workers get from this package: checksums of the weights that they compute with.

vLLM imports this module by name (`worker_extension_cls`) in each worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_rollout_vllm.checksums import add_checksums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WorkerExtension"]

ROWS = 1024
"""Rows of a matrix that are read at a time through its layer."""


class WorkerExtension:
    """Base class that vLLM adds to its workers."""

    model_runner: Any

    def rlhf_checksums(self) -> list[list[int]]:
        """Return pairs of a layer's number and the checksum of its weights."""
        from rlhf_rollout_vllm.receivers import without_adapters

        model = self.model_runner.get_model()
        with torch.no_grad(), without_adapters(model):
            return [[number, total] for number, total in sorted(add_checksums(engine_weights(model)).items())]


def engine_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of vLLM's model, each once.

    On the CPU vLLM packs the matrices of linear layers and keeps nothing else. They are read through the layer: its outputs for
    unit vectors are the columns of its matrix, without rounding.
    """
    from vllm.model_executor.layers.linear import LinearBase

    seen = set()
    for place, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in seen and parameter.numel():
                seen.add(id(parameter))
                yield f"{place}.{name}", parameter
        if isinstance(layer, LinearBase) and not layer.weight.numel():
            weight, size = layer.weight, layer.input_size
            for start in range(0, size, ROWS):
                units = torch.eye(size, dtype=weight.dtype)[start : start + ROWS]
                yield f"{place}.weight", layer.quant_method.apply(layer, units, None)
