"""Conjugate gradient (Hestenes and Stiefel 1952), and the iteration that the released code runs in its place.

Both need a function v -> A v alone; no matrix is formed. Every scalar is an inner product of whole vectors: where vectors are
sharded over ranks, `dot` adds the shares up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Solution", "conjugate_gradient", "released_iteration"]

Apply = Callable[["Tensor"], "Tensor"]
Dot = Callable[["Tensor", "Tensor"], float]


class Solution(NamedTuple):
    """An approximate solution of A x = b."""

    x_D: Tensor
    """the last iterate"""
    products: int
    """applications of A"""
    residual: float
    """norm of b - A x over the norm of b, as the recursion carries it"""
    bend: float
    """p^T A p of the last direction p; if it is not above 0, the direction was not used"""


def inner(a_D: Tensor, b_D: Tensor) -> float:
    """Return the inner product of two whole vectors."""
    return float(a_D @ b_D)


def conjugate_gradient(apply: Apply, b_D: Tensor, steps: int, tolerance: float = 0.0, dot: Dot = inner) -> Solution:
    """Solve A x = b for a symmetric positive definite A, from x = 0 (Li et al. 2025, Algorithm 5).

    Args:
        apply: v -> A v.
        b_D: the right-hand side.
        steps: most applications of A.
        tolerance: stop once the residual's norm is at most this share of b's.
        dot: inner product over all ranks.

    A direction p with p^T A p <= 0 ends the iteration before it is used, as in a truncated Newton method (Steihaug 1983). The
    Hessian of a whole network may have one.
    """
    x_D, r_D, p_D = b_D * 0, b_D.clone(), b_D.clone()
    size = rr = dot(r_D, r_D)
    products, bend = 0, 1.0
    for _ in range(steps):
        if rr <= tolerance**2 * size or rr == 0:
            break
        q_D = apply(p_D)
        products += 1
        bend = dot(p_D, q_D)
        if not bend > 0:
            break
        alpha = rr / bend
        x_D = x_D + alpha * p_D
        r_D = r_D - alpha * q_D
        rr, before = dot(r_D, r_D), rr
        p_D = r_D + rr / before * p_D
    return Solution(x_D, products, (rr / size) ** 0.5 if size > 0 else 0.0, bend)


def released_iteration(apply: Apply, b_D: Tensor, steps: int, dot: Dot = inner) -> Solution:
    """Return what the released code computes in place of conjugate gradient: beta is always 1.

    Its code overwrites r^T r before it divides by it, adds 1e-8 to p^T A p, and stops at r^T r < 1e-10. It does not converge.
    For comparisons with published runs (`compat released`).
    """
    x_D, r_D, p_D = b_D * 0, b_D.clone(), b_D.clone()
    size = rr = dot(r_D, r_D)
    products, bend = 0, 1.0
    for k in range(steps):
        q_D = apply(p_D)
        products += 1
        bend = dot(p_D, q_D)
        alpha = rr / (bend + 1e-8)
        x_D = x_D + alpha * p_D
        if k == steps - 1:
            break
        r_D = r_D - alpha * q_D
        rr = dot(r_D, r_D)
        if rr < 1e-10:
            break
        p_D = r_D + p_D
    return Solution(x_D, products, (rr / size) ** 0.5 if size > 0 else 0.0, bend)
