"""The Bradley-Terry loss of a linear reward on feature differences, with its derivatives.

    r(x, a) = phi(x, a)^T theta        z = phi(x, chosen) - phi(x, rejected)        s(w) = 1 / (1 + exp(-w))
    loss     l = -log s(z^T theta)
    gradient g = -(1 - s(z^T theta)) z
    Hessian  H = s'(z^T theta) z z^T,  s' = s (1 - s)

Li et al. 2025 (arXiv 2502.07193), section 3. A pair whose label is 0 is the pair -z: loss and Hessian are equal.
Letters: B pairs, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gradient_sum", "hessian_product", "kappa", "loss_sum", "slopes"]


def loss_sum(z_BD: Tensor, theta_D: Tensor) -> Tensor:
    """Return the loss of all pairs, added up; a scalar."""
    return -torch.nn.functional.logsigmoid(z_BD @ theta_D).sum()


def gradient_sum(z_BD: Tensor, theta_D: Tensor) -> Tensor:
    """Return the gradient (D,) of the loss, added up over pairs."""
    return -(torch.sigmoid(-(z_BD @ theta_D)) @ z_BD)


def slopes(z_BD: Tensor, theta_D: Tensor) -> Tensor:
    """Return s'(z^T theta) per pair, (B,); 0 to 1/4, symmetric in the label."""
    p_B = torch.sigmoid(z_BD @ theta_D)
    return p_B * torch.sigmoid(-(z_BD @ theta_D))


def hessian_product(z_BD: Tensor, weights_B: Tensor, v_D: Tensor) -> Tensor:
    """Return sum over pairs of weight z z^T v, (D,), without forming the matrix."""
    return (weights_B * (z_BD @ v_D)) @ z_BD


def kappa(z_BD: Tensor, theta_D: Tensor) -> float:
    """Return the non-linearity max 1 / s'(z^T theta) of these pairs; at least 4, about exp of the largest margin."""
    return float(1 / slopes(z_BD, theta_D).min())
