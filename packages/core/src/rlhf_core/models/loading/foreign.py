"""Score heads under the names that other libraries save them by: a linear layer to one number next to a language model.

TRL's value-head models and OpenRLHF's reward models and critics are such checkpoints. Read from folders and safetensors alone.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn

__all__ = ["foreign_head"]

NAMES = ("v_head.summary", "value_head", "v_head")
"""Names of the layer; `score`, which OpenRLHF uses too, is transformers' own."""


def foreign_head(folder: Path) -> nn.Linear | None:
    """The head in the checkpoint, with its bias if it has one; None if there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            keys = set(tensors.keys())
            name = next((name for name in NAMES if f"{name}.weight" in keys), None)
            if name is None:
                continue
            weight = tensors.get_tensor(f"{name}.weight")
            bias = tensors.get_tensor(f"{name}.bias") if f"{name}.bias" in keys else None
        if weight.shape[0] != 1:
            continue
        head = nn.Linear(weight.shape[1], 1, bias=bias is not None, dtype=weight.dtype)
        head.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        return head
    return None
