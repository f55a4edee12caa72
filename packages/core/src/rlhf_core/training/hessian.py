"""The Hessian of a step's loss times vectors, by double backward (Pearlmutter 1994): H v = d/dtheta (g(theta)^T v).

One micro-batch after the other: its graph of the gradient is freed before the next one's is made. Attention runs in torch's
reference implementation meanwhile, whose operations have second derivatives; the fused kernels' backward passes have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.plan import RoleSpec

__all__ = ["HessianProduct", "check_second_derivatives", "second_derivatives"]


class HessianProduct:
    """The product of this rank's loss, added up over micro-batches.

    Args:
        parameters: what is trained, whole.
        vectors: one for each.
    """

    def __init__(self, parameters: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.vectors = list(vectors)
        self.total = [torch.zeros_like(vector) for vector in vectors]

    def add(self, loss: Tensor) -> None:
        """Add the product of one micro-batch's share of the loss, in place of its backward pass."""
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        along = [(g * v.to(g.dtype)).sum() for g, v in zip(gradients, self.vectors, strict=True) if g is not None]
        slope = torch.stack(along).sum() if along else loss.detach()
        if not slope.requires_grad:  # the loss is linear in what is trained
            return
        products = torch.autograd.grad(slope, self.parameters, allow_unused=True)
        for total, product in zip(self.total, products, strict=True):
            if product is not None:
                total += product.detach()


def check_second_derivatives(config: RunConfig, spec: RoleSpec, module: Any) -> None:
    """Check that a role's forward pass can be differentiated twice.

    torch itself does not: where a function has no second derivative, `torch.autograd.grad` leaves its part out.

    Raises:
        UsageError: flash attention and the language-model head in chunks cannot.
    """
    attention = f"{spec.name}.attention"
    who = f"the optimizer of the {spec.name} needs second derivatives, which"
    if module.flash:
        raise UsageError(f"{who} flash attention does not support; pass {run_option(attention, 'sdpa')}")
    if spec.needs_language_head and config.chunk:
        raise UsageError(f"{who} log-probabilities in chunks do not support; pass {run_option('chunk', 0)}")


@contextmanager
def second_derivatives(role: str) -> Iterator[None]:
    """While it is open, forward passes have second derivatives.

    Raises:
        UsageError: an operation of the pass has none.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        first, attention = str(error).splitlines()[0], f"{role}.attention"
        raise UsageError(
            f"the {role} cannot be differentiated twice, which its optimizer needs: {first}; try "
            f"{run_option(attention, 'eager')}"
        ) from error
