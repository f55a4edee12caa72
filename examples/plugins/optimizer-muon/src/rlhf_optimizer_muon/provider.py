"""Options of Muon, and the choice of the parameters that it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core import OptimizerProvider, UsageError, parameter_groups

if TYPE_CHECKING:
    from torch.nn import Parameter

__all__ = ["Muon"]


@dataclass(frozen=True)
class Muon(OptimizerProvider):
    """Muon (Jordan et al. 2024) for the matrices of the body, AdamW for embeddings, heads and vectors.

    With `scale adamw`, updates have the root mean square of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training").
    Learning rates and weight decay that work for AdamW then work here.
    """

    momentum: float = 0.95
    """decay of the momentum"""
    nesterov: bool = True
    """look ahead by one step of the momentum"""
    iterations: int = 5
    """Newton-Schulz iterations"""
    scale: Literal["adamw", "spectral"] = "adamw"
    """size of an update: 0.2 sqrt(max(rows, columns)), or sqrt(max(1, rows / columns)) as in the first Muon"""
    weight_decay: float = 0.0
    """decoupled decay of matrices"""
    exclude: tuple[str, ...] = ("embed", "wte", "wpe", "lm_head", "score", "heads.")
    """parts of names of matrices that AdamW trains: embeddings and heads"""
    adamw_ratio: float = 1.0
    """learning rate of what AdamW trains, as a multiple of lr"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments"""
    eps: float = 1e-8
    """AdamW's epsilon"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if self.iterations < 1:
            raise UsageError(f"iterations must be at least 1, not {self.iterations}")

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]], total_steps: int) -> Any:
        from rlhf_optimizer_muon.muon import MuonOptimizer

        named = list(named_parameters)
        matrices = [parameter for name, parameter in named if parameter.dim() == 2 and not self._excludes(name)]
        rest = [(name, parameter) for name, parameter in named if parameter.dim() != 2 or self._excludes(name)]
        muon = {
            "params": matrices,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "iterations": self.iterations,
            "scale": self.scale,
        }
        adamw = {"lr": self.adamw_ratio * self.lr, "betas": self.betas, "eps": self.eps}
        groups = [{**group, **adamw} for group in parameter_groups(rest, self.weight_decay)]
        return MuonOptimizer([*([muon] if matrices else []), *groups])

    def _excludes(self, name: str) -> bool:
        """Return True if AdamW trains the matrix of this name."""
        return any(part in name for part in self.exclude)
