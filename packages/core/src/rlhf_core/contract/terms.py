"""Terms: what an algorithm consists of, and the chosen providers that it builds them from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.requirements import split_output
from rlhf_core.errors import UsageError, advice, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.providers import Advantage, Loss

__all__ = ["PAIRS_ADVICE", "ProviderChoices", "Term", "update_order"]

PAIRS_ADVICE = "use data with the columns chosen and rejected" + advice(
    f" (or name them with {run_option('data.chosen_key')} and {run_option('data.rejected_key')})"
)
"""Advice in errors about data without pairs."""


@dataclass(frozen=True)
class Term:
    """One thing that is minimized: `role` is trained on what `source` gave, with this credit and this loss.

    Terms that share a source and an advantage share the work; the terms of one role are summed in one optimizer step.
    """

    role: str
    """the role trained"""
    source: str
    """`data`, or the role that is sampled"""
    loss: Loss
    advantage: Advantage | None = None
    """None: the batch is used as it is"""
    weight: float = 1.0
    every: int = 1
    """steps between two in which the term takes part; in the others it causes no sampling and no training"""
    after: str = ""
    """a role that is updated first in the same step: needs and credit of this term are computed with its new weights"""

    @property
    def outputs(self) -> frozenset[str]:
        """Outputs of the trained role that the loss differentiates."""
        return self.loss.outputs

    @property
    def partners(self) -> frozenset[str]:
        """Roles whose whole distributions the loss compares with: those of outputs `<role>.<output>`."""
        return frozenset(role for role, _ in map(split_output, self.outputs) if role)

    @property
    def needs(self) -> frozenset[str]:
        """Extras that the loss reads."""
        return self.loss.needs

    @property
    def unit(self) -> int:
        """Adjacent rows that the loss reads together."""
        return self.loss.rows_per_unit


def update_order(terms: Iterable[Term]) -> tuple[str, ...]:
    """Return the trained roles in the order of their updates.

    That is the order of their terms, except that a role follows every role that one of its terms names in `after`.

    Raises:
        UsageError: roles wait for each other.
    """
    terms = tuple(terms)
    waits = {term.role: {each.after for each in terms if each.role == term.role} - {term.role} for term in terms}
    order: list[str] = []
    while len(order) < len(waits):
        ready = [role for role in waits if role not in order and waits[role] & waits.keys() <= set(order)]
        if not ready:
            rest = [role for role in waits if role not in order]
            raise UsageError(f"the updates of {' and '.join(rest)} wait for each other: change `after` of their terms")
        order.append(ready[0])
    return tuple(order)


@dataclass(frozen=True)
class ProviderChoices:
    """Providers from which an algorithm builds its terms: chosen by the user or by the algorithm's defaults."""

    advantage: Advantage | None = None
    loss: Loss | None = None
    sampling: Sampling | None = None
    providers: Mapping[str, Any] = field(default_factory=dict)
    """every chosen provider by kind"""
