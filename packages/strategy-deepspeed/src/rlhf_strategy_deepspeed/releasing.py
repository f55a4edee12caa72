"""Linear layers under stage 3 that hold no gathered weights until the backward pass.

`torch.nn.functional.linear` saves a view of its weight, which outlives the release of the parameter: after a forward pass
without gradient checkpointing a rank would hold the whole model. DeepSpeed has a function that saves the parameter instead and
gathers it again. Its setting `memory_efficient_linear` replaces torch's function for the rest of the process, and so for
every role and engine in it. Here it is replaced for one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_core.lazy import torch

__all__ = ["releasing_weights"]


@contextmanager
def releasing_weights() -> Iterator[None]:
    """Let linear layers save their parameters. A pass that computes layers again in its backward pass must do both inside."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    plain = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = plain
