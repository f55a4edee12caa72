"""Two memories of curvature, H = lambda I + sum of s' z z^T: dense, and diagonal plus low rank.

`Curvature` is their protocol. Letters: B vectors, D features, R rows of a factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Curvature", "Dense", "LowRank"]

BLOCK = 256
"""Rows that one downdate takes at once: its own system stays small compared with D x D."""


class Curvature(Protocol):
    """A symmetric positive definite matrix H, (D, D), of which only products are asked."""

    def apply(self, v_BD: Tensor) -> Tensor:
        """Return H v for each row, of the shape given; one vector (D,) or several (B, D)."""

    def solve(self, v_BD: Tensor) -> Tensor:
        """Return H^{-1} v for each row."""

    def norm_inverse(self, z_BD: Tensor) -> Tensor:
        """Return the norm sqrt(z^T H^{-1} z) of each row, (B,): the uncertainty of the reward difference along z."""


def norm_inverse(curvature: Curvature, z_BD: Tensor) -> Tensor:
    """Return sqrt(z^T H^{-1} z) per row, (B,); rounding below 0 counts as 0."""
    z_BD = z_BD.double()
    return (z_BD * curvature.solve(z_BD)).sum(-1).clamp(min=0).sqrt()


class Dense:
    """H by its inverse P, (D, D), which rank-one and block updates keep exact (Sherman-Morrison, Woodbury)."""

    def __init__(self, inverse_DD: Tensor) -> None:
        self.inverse_DD = inverse_DD

    @classmethod
    def ridge(cls, d: int, ridge: float) -> Dense:
        """Return ridge times the identity.

        Raises:
            UsageError: it is not positive, so that the curvature is singular before any pair.
        """
        if not ridge > 0:
            raise UsageError(f"the curvature is singular with damping {ridge}; damping must be above 0")
        return cls(torch.eye(d, dtype=torch.float64) / ridge)

    @property
    def matrix_DD(self) -> Tensor:
        """H itself, from a Cholesky factorization of P."""
        factor_DD, failed = torch.linalg.cholesky_ex(self.inverse_DD)
        if int(failed):
            raise UsageError("the stored curvature is not positive definite; start with a new estimator")
        matrix_DD: Tensor = torch.cholesky_inverse(factor_DD)
        return matrix_DD

    def apply(self, v_BD: Tensor) -> Tensor:
        rows_BD = v_BD.double().reshape(-1, len(self.inverse_DD))
        product_BD: Tensor = torch.linalg.solve(self.inverse_DD, rows_BD.mT).mT
        return product_BD.reshape(v_BD.shape)

    def solve(self, v_BD: Tensor) -> Tensor:
        return v_BD.double() @ self.inverse_DD

    def norm_inverse(self, z_BD: Tensor) -> Tensor:
        return norm_inverse(self, z_BD)

    def plus(self, z_BD: Tensor, weights_B: Tensor) -> Dense:
        """Return H + sum of weight z z^T, a new matrix."""
        inverse_DD = self.inverse_DD.clone()
        for z_bD, weights_b in zip(z_BD.split(BLOCK), weights_B.split(BLOCK), strict=True):
            scaled_bD = weights_b.sqrt()[:, None] * z_bD
            u_Db = inverse_DD @ scaled_bD.T
            inner_bb = torch.eye(len(z_bD), dtype=torch.float64) + scaled_bD @ u_Db
            half_bD = torch.linalg.solve_triangular(torch.linalg.cholesky(inner_bb), u_Db.T, upper=False)
            inverse_DD -= half_bD.T @ half_bD
        return Dense(inverse_DD)

    def add_one(self, u_D: Tensor, weight: float, spread: float) -> None:
        """Add weight z z^T in place, given u = P z and spread = z^T P z: O(D^2)."""
        self.inverse_DD.addr_(u_D, u_D, alpha=-weight / (1 + weight * spread))


class LowRank:
    """H as a positive diagonal plus F^T F, at most `rank` rows of F after a compression and twice as many before it.

    The rows that a compression drops go into the diagonal, each coordinate by its own square, so that the trace is kept. With
    rank >= D nothing is ever dropped: the memory is then exact.

    Args:
        diagonal_D: above 0.
        factor_RD: rows F.
        rank: R at most, after a compression.
    """

    def __init__(self, diagonal_D: Tensor, factor_RD: Tensor, rank: int) -> None:
        if not float(diagonal_D.min()) > 0:
            raise UsageError(
                f"the curvature is singular with damping {float(diagonal_D.min())}; damping must be above 0"
            )
        self.diagonal_D = diagonal_D
        self.factor_RD = factor_RD
        self.rank = rank

    @classmethod
    def ridge(cls, d: int, ridge: float, rank: int) -> LowRank:
        """Return ridge times the identity."""
        ridge_D = torch.full((d,), ridge, dtype=torch.float64)
        return cls(ridge_D, torch.zeros((0, d), dtype=torch.float64), rank)

    def apply(self, v_BD: Tensor) -> Tensor:
        v_BD = v_BD.double()
        return v_BD * self.diagonal_D + (v_BD @ self.factor_RD.T) @ self.factor_RD

    def solve(self, v_BD: Tensor) -> Tensor:
        return self.shifted_solve(v_BD, 0.0)

    def shifted_solve(self, v_BD: Tensor, mu: float) -> Tensor:
        """Return (H + mu I)^{-1} v for each row, by a system of R unknowns (Woodbury)."""
        scaled_BD = v_BD.double() / (self.diagonal_D + mu)
        if not len(self.factor_RD):
            return scaled_BD
        factor_RD = self.factor_RD / (self.diagonal_D + mu)
        inner_RR = torch.eye(len(factor_RD), dtype=torch.float64) + self.factor_RD @ factor_RD.T
        rows = torch.cholesky_solve(
            (scaled_BD @ self.factor_RD.T).reshape(-1, len(inner_RR)).T, torch.linalg.cholesky(inner_RR)
        )
        return scaled_BD - (rows.T @ factor_RD).reshape(scaled_BD.shape)

    def norm_inverse(self, z_BD: Tensor) -> Tensor:
        return norm_inverse(self, z_BD)

    def add(self, z_BD: Tensor, weights_B: Tensor) -> None:
        """Add sum of weight z z^T in place."""
        for z_bD, weights_b in zip(z_BD.split(self.rank), weights_B.split(self.rank), strict=True):
            self.factor_RD = torch.cat([self.factor_RD, weights_b.sqrt()[:, None] * z_bD])
            if len(self.factor_RD) > 2 * self.rank:
                self._compress()

    def _compress(self) -> None:
        """Keep the `rank` strongest directions of F, and the diagonal of the rest."""
        _, values_R, rows_RD = torch.linalg.svd(self.factor_RD, full_matrices=False)
        scaled_RD = values_R[:, None] * rows_RD
        self.factor_RD = scaled_RD[: self.rank].clone()
        self.diagonal_D = self.diagonal_D + scaled_RD[self.rank :].square().sum(0)
