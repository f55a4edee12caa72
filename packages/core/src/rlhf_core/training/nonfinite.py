"""Guard training against values that are not finite: such a loss or gradient ends the run, or its optimizer step is skipped;
either way the samples are kept.

Ranks agree without a word: each watches its own micro-batches, and a loss that is not finite gets a gradient that is not
either. So the norm of the gradients, which are summed over ranks, is finite on every rank or on none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.requirements import per_token
from rlhf_core.errors import NotFinite
from rlhf_core.lazy import torch
from rlhf_core.util.jsonl import append_line

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs
    from rlhf_core.contract.terms import Term

__all__ = ["Watch", "keep_samples", "row_as_dict", "term_name", "with_nan_gradient"]


class Watch:
    """Watches one optimizer step of a role."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.micro_batches = 0
        """number of micro-batches on any rank: 0 if credit selected no row of any rank"""
        self._term = ""
        self._samples: list[dict[str, Any]] = []

    def micro_batch(self, loss: float, values: Mapping[str, Tensor], batch: Batch) -> None:
        """Remember the rows of a micro-batch whose loss is not finite. `values`: each term's, by the loss's name."""
        self.micro_batches += 1
        if math.isfinite(loss):
            return
        for term, tensor in values.items():
            bad = _bad_rows(tensor.detach().cpu(), batch)
            if bad:
                self._term = self._term or term
                self._samples += [{"role": self.role, "term": term, **row_as_dict(batch, row)} for row in bad]

    def check_loss(self, total: float) -> None:
        """Raise `NotFinite` if the step's loss, summed over ranks, is not finite."""
        if not math.isfinite(total):
            of = f" in the term {self._term}" if self._term else ""
            raise NotFinite(f"the loss of role {self.role!r} is {total}{of}", self._samples)

    def check_gradient(self, norm: float, batches: Mapping[str, Batch]) -> None:
        """Raise `NotFinite` if the gradient's norm is not finite; any row may be the cause, so all are kept."""
        if not math.isfinite(norm):
            rows = [(batch, row) for batch in batches.values() for row in range(len(batch))]
            samples = [{"role": self.role, **row_as_dict(batch, row)} for batch, row in rows]
            raise NotFinite(f"the gradient of role {self.role!r} has norm {norm}", samples)


def with_nan_gradient(loss: Tensor, outputs: Outputs) -> Tensor:
    """Return a loss whose gradient is nan at every token, where that of `loss` might be finite or masked."""
    return loss + sum(math.nan * each.float().sum() for each in outputs.values() if each.requires_grad)


def term_name(term: Term) -> str:
    """Return the name of a term in messages: its loss and the source of its batch."""
    return f"{type(term.loss).__name__} on {term.source}"


def row_as_dict(batch: Batch, row: int) -> dict[str, Any]:
    """A row as plain values: its texts, tokens, label, and every number that is known of it, per completion token too."""
    length = int(batch.lengths_N[row])
    known: dict[str, Any] = {
        name: (tensor[row, :length] if per_token(name) else tensor[row]).tolist()
        for name, tensor in batch.extras.items()
    }
    tokens = batch.tokens_NT[row, :length].tolist()
    return {"prompt": batch.prompts[row], "completion": batch.texts[row], "tokens": tokens} | known


def keep_samples(output: str | Path, step: int, error: NotFinite) -> Path:
    """Add the samples of `error` to OUTPUT/failed/step-N.jsonl; the path."""
    path = Path(output) / "failed" / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in error.samples:
        append_line(path, _to_json(row))
    return path


def _to_json(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite as texts."""
    if isinstance(value, dict):
        return {key: _to_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _bad_rows(values: Tensor, batch: Batch) -> list[int]:
    """Rows with a value that is not finite; of per-unit values (a pair's), all rows of the unit."""
    if values.dim() == 2:
        return torch.where(batch.mask_NT, ~values.isfinite(), False).any(1).nonzero()[:, 0].tolist()
    unit = len(batch) // len(values)
    return [row for row in range(len(batch)) if not bool(values[row // unit].isfinite())]
