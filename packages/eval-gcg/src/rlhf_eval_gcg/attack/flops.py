"""Floating-point operations of an attack, counted from shapes.

Two rules. `counted` is what is multiplied: 2 operations per weight of a linear layer and token, those of the head at the kept
positions only, 4 per query, key and channel of attention; backward as much as forward for linear layers, since weights get no
gradient. That is what `torch.utils.flop_counter` counts. `2nt` is the convention of papers (Kaplan et al. 2020, section 2.1):
2NT forward and 4NT backward, for N parameters and T tokens. Neither counts tokens whose keys and values are cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_core.lazy import torch

__all__ = ["Costs"]


@dataclass(frozen=True)
class Costs:
    """The costs of a model's passes, in floating-point operations."""

    parameters: int
    """N, all of them"""
    linear: int
    """weights of the layers that every token passes"""
    head: int
    """weights of the output layer"""
    attention: int
    """heads times channels, summed over layers"""
    rule: str = "counted"
    """counted or 2nt"""

    @classmethod
    def measure(cls, model: Any, rule: str = "counted") -> Costs:
        """Return the costs of a model of transformers."""
        head = model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        try:
            heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
            size = int(config.to_dict().get("head_dim") or config.hidden_size // heads)
        except AttributeError:  # recurrent layers: all their products are linear
            heads = layers = size = 0
        head_weights = 0 if head is None else int(head.weight.numel())
        linear = sum(
            int(module.weight.numel())
            for module in model.modules()
            if module is not head and isinstance(module, _linear_classes())
        )
        return cls(sum(p.numel() for p in model.parameters()), linear, head_weights, layers * heads * size, rule)

    def forward(self, rows: int, new: int, past: int, keep: int) -> float:
        """Return the operations of a forward pass.

        Args:
            rows: rows of the batch.
            new: tokens of a row that are computed.
            past: tokens of a row before them, whose keys and values are cached.
            keep: positions of a row whose logits are computed.
        """
        if self.rule == "2nt":
            return 2.0 * self.parameters * rows * new
        per_row = 2.0 * (self.linear * new + self.head * keep) + 4.0 * self.attention * new * (past + new)
        return rows * per_row

    def backward(self, rows: int, new: int, past: int, keep: int) -> float:
        """Return the operations of the backward pass to the input embeddings; arguments of `forward`."""
        if self.rule == "2nt":
            return 4.0 * self.parameters * rows * new
        per_row = 2.0 * (self.linear * new + self.head * keep) + 8.0 * self.attention * new * (past + new)
        return rows * per_row

    def over_tokens(self, positions: int, size: int, tokens: int) -> float:
        """Return the operations of the gradient over all tokens at `positions`, for embeddings of `size` channels."""
        return 0.0 if self.rule == "2nt" else 2.0 * positions * size * tokens


def _linear_classes() -> tuple[type[Any], ...]:
    """Return the classes of layers that multiply by a weight."""
    from transformers.pytorch_utils import Conv1D

    return (torch.nn.Linear, Conv1D)
