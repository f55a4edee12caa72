"""Workload of one device per step: rows, their lengths, and micro-batches.

Every row is taken to be as long as rows may be, so that memory is an upper bound for shorter ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, lcm
from typing import TYPE_CHECKING

from rlhf_core.contract.plan import DATA
from rlhf_core.training.old_logprobs import OLD, is_live

if TYPE_CHECKING:
    from rlhf_core.contract.plan import CreditSpec, Plan, RoleSpec
    from rlhf_core.forecast.options import PlanOptions

__all__ = ["Cells", "Workload"]


@dataclass(frozen=True)
class Cells:
    """The micro-batches of a role's pass over some rows, all alike."""

    rows: int
    """rows of a micro-batch"""
    prompt: int
    """tokens of a prompt"""
    completion: int
    """tokens of a completion"""
    rounds: int
    """micro-batches"""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * (self.prompt + self.completion)


@dataclass(frozen=True)
class Workload:
    """The rows of a step on one of `ranks` devices, or groups of devices, that share the data."""

    plan: Plan
    prompt: int
    """tokens of a prompt"""
    completion: int
    """tokens of a completion"""
    ranks: int

    @classmethod
    def for_run(cls, plan: Plan, options: PlanOptions, ranks: int) -> Workload:
        """Return the workload of `plan` with the lengths of `options`."""
        prompt = options.prompt_tokens or plan.config.max_prompt_tokens
        sampled = plan.config.sampling.max_new_tokens if plan.online else prompt
        return cls(plan, prompt, options.completion_tokens or sampled, ranks)

    @property
    def prompts(self) -> int:
        """Prompts, or rows of data, of a step."""
        return -(-self.plan.config.batch_size // self.ranks)

    def training(self, spec: RoleSpec) -> Cells:
        """Return the micro-batches of an optimizer step of a trained role; of several batches those of the largest."""
        found = [
            self._cells(self._credited_rows(self.plan.credits[key]) // self.plan.config.minibatches, unit)
            for key, unit in self._units(spec).items()
        ]
        return max(found, key=lambda cells: (cells.tokens, cells.rounds))

    def reading(self, spec: RoleSpec) -> Cells:
        """Return the micro-batches of a role's forward pass without gradient over all rows of a source."""
        return self._cells(max(map(self._source_rows, self.plan.sources), default=1), 1)

    def forward_rows(self, role: str) -> int:
        """Rows that a role reads without gradient in a step, over all sources and credits."""
        read = {credit.source for credit in self.plan.credits.values() if self._asks(credit, role)}
        if any(need.role == role for need in self.plan.reward_needs):
            read |= {source for source in self.plan.sources if source != DATA}
        return sum(map(self._source_rows, read))

    def trained_rows(self, spec: RoleSpec) -> int:
        """Rows that a trained role takes forward and backward in a step, over all passes."""
        rows = sum(self._credited_rows(self.plan.credits[key]) for key in self._units(spec))
        return rows * self.plan.config.update_epochs

    def keeps_graph(self, spec: RoleSpec) -> bool:
        """Return True if a role's pass before credit is the one that trains it, whose graph is held in between."""
        if not (spec.trained and self.plan.single_update):
            return False
        asked = any(self._asks(self.plan.credits[key], spec.name) for key in self._units(spec))
        return asked and self.reading(spec).rounds == 1

    def _units(self, spec: RoleSpec) -> dict[str, int]:
        """Rows that stay together, by the key of each credit that trains a role."""
        units: dict[str, int] = {}
        for key, term in spec.terms:
            units[key] = lcm(units.get(key, 1), term.unit)
        return units

    def _asks(self, credit: CreditSpec, role: str) -> bool:
        """Return True if what `credit` needs of `role` takes a forward pass."""
        return any(
            need.role == role
            and not is_live(self.plan, credit, need.name, 0.0)
            and not self._is_exact(credit, need.name)
            for need in credit.needs
        )

    def _is_exact(self, credit: CreditSpec, name: str) -> bool:
        """Return True if the rollout engine's log-probabilities serve as the old ones (`old_logprobs.keep_exact`)."""
        rollout, sampling = self.plan.config.providers.get("rollout"), self.plan.config.sampling
        spec = self.plan.roles.get(credit.source)
        if name != OLD or rollout is None or spec is None:
            return False
        return bool(rollout.exact and sampling.temperature > 0 and spec.options.compute_dtype == "float32")

    def _source_rows(self, source: str) -> int:
        """Rows of a source on this device."""
        if source == DATA:
            pairs = any(term.unit > 1 for term in self.plan.terms if term.source == DATA)
            return self.prompts * (2 if pairs else 1)
        return self.prompts * self.plan.config.sampling.n * max(1, source.count("+") + 1)

    def _credited_rows(self, credit: CreditSpec) -> int:
        """Rows that the losses of a credit read on this device."""
        selects = credit.advantage.selects if credit.advantage is not None else ""
        return self.prompts * 2 if selects == "pairs" else self._source_rows(credit.source)

    def _cells(self, rows: int, unit: int) -> Cells:
        """Return how `rows` are cut under the token budget (`training.microbatch.micro_rows`)."""
        units = max(1, ceil(rows / unit))
        most = max(1, self.plan.config.micro_tokens // (unit * (self.prompt + self.completion)))
        fitting = min(units, most)
        return Cells(fitting * unit, self.prompt, self.completion, ceil(units / fitting))
