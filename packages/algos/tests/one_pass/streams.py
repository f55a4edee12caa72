"""Streams of pairs for tests: features on the unit sphere, labels of a Bradley-Terry model."""

from __future__ import annotations

import torch
from torch import Tensor


def f64(*rows: object) -> Tensor:
    """Return a float64 tensor."""
    return torch.tensor(rows, dtype=torch.float64)


def sphere(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Return n points (n, D) on the unit sphere."""
    points = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def stream(T: int, d: int = 16, norm: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return T pairs (T, D), chosen minus rejected, and the true theta of this norm, (D,)."""
    generator = torch.Generator().manual_seed(seed)
    theta_D = norm * sphere(1, d, generator)[0]
    z_TD = sphere(T, d, generator) - sphere(T, d, generator)
    prefers_T = torch.rand(T, generator=generator, dtype=torch.float64) < torch.sigmoid(z_TD @ theta_D)
    return torch.where(prefers_T[:, None], z_TD, -z_TD), theta_D
