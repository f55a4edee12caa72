"""Projection on the ball |theta| <= B in the norm of a positive definite matrix H.

    argmin over |theta| <= B of (theta - theta')^T H (theta - theta')

If |theta'| > B, the minimizer is (H + mu I)^{-1} H theta' with the mu > 0 that makes its norm equal to B. That norm falls in
mu, so one root is to be found. Li et al. 2025, equation (3), second line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["project", "project_by_inverse"]

HALVINGS = 200
"""Bisections at most; float64 is used up after about 60 of a well-scaled bracket."""


def project(theta_D: Tensor, shrink: Callable[[float], Tensor], radius: float) -> Tensor:
    """Return the projection of `theta_D` on the ball of this radius; `theta_D` itself if it is inside, or the radius is 0.

    Args:
        theta_D: the point.
        shrink: mu -> (H + mu I)^{-1} H theta.
        radius: B; 0 does not project.
    """
    if radius <= 0 or float(theta_D.norm()) <= radius:
        return theta_D
    low, high = 0.0, 1.0
    while float(shrink(high).norm()) > radius:
        low, high = high, 4 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if float(shrink(middle).norm()) > radius else (low, middle)
    inside_D = shrink(high)
    return inside_D * (radius / float(inside_D.norm()))  # the root to the last bit: bisection ends just inside


def project_by_inverse(theta_D: Tensor, inverse_DD: Tensor, radius: float) -> Tensor:
    """Return the projection given H^{-1}: in its eigenbasis, a coordinate is divided by 1 + mu times its eigenvalue."""
    if radius <= 0 or float(theta_D.norm()) <= radius:
        return theta_D
    values_D, vectors_DD = torch.linalg.eigh(inverse_DD)
    at_D = vectors_DD.T @ theta_D
    inside_D = project(at_D, lambda mu: at_D / (1 + mu * values_D), radius)
    return torch.mv(vectors_DD, inside_D)
