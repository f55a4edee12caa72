"""Check the results of losses against their contract, and split their metrics by data source.

Whatever couples rows is credit, computed before, so that a loss of some rows is the loss that they have among others. It
is asked again, without a gradient, for the rows of each `datasource` of a batch of data; compared with the forward pass
that costs nothing. Sampled batches have their rewards split instead (`data.sources`).
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.requirements import trim
from rlhf_core.contract.results import LossTerms, Metric, Outputs, Reduction
from rlhf_core.contract.terms import Term
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch
from rlhf_core.training.reduction import REDUCTIONS, Means, count, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_by_source", "check_loss_terms", "check_metric"]


def check_loss_terms(term: Term, result: LossTerms, micro: Batch) -> LossTerms:
    """`result`, if it keeps the contract of a loss."""
    who = f"loss {type(term.loss).__qualname__} of {type(term.loss).__module__}"
    if not isinstance(result, LossTerms):
        raise ContractError(f"{who} returned {type(result).__name__}; a loss returns LossTerms(values, Reduction(...))")
    if not isinstance(result.reduction, Reduction) or result.reduction.per not in REDUCTIONS:
        names = ", ".join(REDUCTIONS)
        raise ContractError(f"{who} asks for {result.reduction!r}; write Reduction(per), with per one of {names}")
    if result.reduction.per == "constant" and result.reduction.length <= 0:
        raise ContractError(f"{who} asks for {result.reduction!r}; the length must be above 0")
    if not isinstance(result.values, torch.Tensor):
        raise ContractError(f"{who} returned values that are a {type(result.values).__name__}, not a tensor")
    for name, metric in result.metrics.items():
        check_metric(who, name, metric)
    per_sample = result.reduction.per == "sample"
    expected = (len(micro) // term.unit,) if per_sample else tuple(micro.mask_NT.shape)
    if tuple(result.values.shape) != expected:
        raise ContractError(
            f"{who} returned values of shape {tuple(result.values.shape)}; "
            f"reduction {result.reduction.per!r} needs {expected}"
        )
    if not result.values.requires_grad:
        raise ContractError(f"{who} returned values without a gradient; compute them from `outputs`")
    return result


def check_metric(who: str, name: str, metric: object, *, plain: bool = False) -> None:
    """Require a `Metric` of two scalars, or where `plain` a number too.

    Raises:
        ContractError: it is something else; the message begins with `who`, which returned it.
    """
    if plain and not isinstance(metric, Metric):
        fits = _is_scalar(metric)
    else:
        fits = isinstance(metric, Metric) and _is_scalar(metric.total) and _is_scalar(metric.count)
    if not fits:
        kinds = "a number, or a Metric" if plain else "a Metric"
        raise ContractError(
            f"{who}: the metric {name!r} must be {kinds} of two scalars, such as Metric.over(values), "
            f"not {reprlib.repr(metric)}"
        )


def _is_scalar(value: object) -> bool:
    """Return True for a number or a tensor of one number."""
    return value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, (int, float))


def add_by_source(means: Means, role: str, term: Term, part: str, outputs: Outputs, micro: Batch) -> None:
    """Add the loss and the metrics of each datasource's rows, as `loss/<role>/<datasource>` and `<role>/<name>/<datasource>`.

    Rows without a source are not counted. `part` identifies the role's term, whose losses are added.
    """
    own = [str(each["datasource"]) if "datasource" in each else None for each in micro.meta]
    for source in sorted({each for each in own if each is not None}):
        rows = torch.tensor([i for i, each in enumerate(own) if each == source])
        some = micro.rows(rows)
        with torch.no_grad():
            terms = term.loss({name: _rows(name, values, rows, some) for name, values in outputs.items()}, some)
        if terms.reduction.per != "sum":  # that of some rows is no mean over them
            total = term.weight * float(weighted_sum(terms.values, terms.reduction, some))
            means.add(f"loss/{role}/{source}", total, count(terms.reduction, some, term.unit), part=part)
        for name, metric in terms.metrics.items():
            means.add_metric(f"{role}/{name}/{source}", metric)


def _rows(name: str, values: Tensor, rows: Tensor, some: Batch) -> Tensor:
    """An output of these rows, trimmed as their batch is; one that is of no row as it is."""
    if not values.dim():
        return values.detach()
    picked = values.detach()[rows.to(values.device)]
    return trim(name, picked, some.tokens_NT.shape[1])
