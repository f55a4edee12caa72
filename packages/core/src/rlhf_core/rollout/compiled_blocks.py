"""A model's blocks compiled for decoding steps: `torch.compile` makes few kernels of the many small ones between products.

A block is compiled once for all layers of its kind, in about ten seconds, and once more with the number of rows left open
when a second one is met. Only steps run compiled; training and the reading of prompts do not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["compile_blocks"]


@contextmanager
def compile_blocks(model: nn.Module, attentions: Collection[nn.Module]) -> Iterator[None]:
    """Inside, the blocks that hold a model's attention layers run compiled."""
    blocks = find_blocks(model, attentions)
    before = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = torch.compile(block._call_impl)
    try:
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            block._compiled_call_impl = old


def find_blocks(model: nn.Module, attentions: Collection[nn.Module]) -> list[Any]:
    """Return the members of lists of modules that hold an attention layer each, those of the outermost list."""
    found: list[Any] = []
    inside: set[nn.Module] = set()
    for modules in model.modules():  # outer ones first
        if isinstance(modules, torch.nn.ModuleList):
            for block in modules:
                if block not in inside and any(each in attentions for each in block.modules()):
                    found.append(block)
                    inside |= set(block.modules())
    return found
