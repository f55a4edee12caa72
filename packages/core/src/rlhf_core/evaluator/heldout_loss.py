"""Held-out loss: what an algorithm minimizes, measured on rows that it is not trained on.

The rows go the way of a training batch: needs of frozen roles, credit, the losses themselves, and the reduction they ask for,
over the rows of all ranks together. So the loss is that of one batch of all held-out rows, whatever the batch size of the run.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import exp
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.batch import StepInfo
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.plan import DATA
from rlhf_core.contract.providers import Evaluator
from rlhf_core.errors import UsageError
from rlhf_core.training.credit import assign_credit, compute_needs, prepare_rows
from rlhf_core.training.loss_checks import check_loss_terms
from rlhf_core.training.old_logprobs import OLD, with_live
from rlhf_core.training.reduction import Means, count, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.run_view import RunView
    from rlhf_core.contract.terms import Term

__all__ = ["HeldoutLoss"]


@dataclass(frozen=True)
class HeldoutLoss(Evaluator):
    """Loss, perplexity and the loss's own metrics (accuracy and margin of pairs) on held-out rows."""

    rows: int = 256
    """maximum number of held-out rows, taken from the first, as one batch; 0 takes all"""

    samples: ClassVar[bool] = False
    """nothing is sampled"""

    def __call__(self, run: RunView) -> dict[str, float]:
        """`heldout/loss`, `heldout/<metric of the loss>`, and `heldout/perplexity` where completions are learned as they are.

        Those of a trained role that is not the policy are `heldout/<role>/…`.
        """
        if not any(_learns_rows(term) for term in run.plan.terms):
            raise UsageError(
                "evaluator heldout_loss measures a loss on rows of data, but this algorithm does not train on "
                "data; use the evaluator heldout"
            )
        batches = self._credit_rows(run)
        metrics: dict[str, float] = {}
        for name in run.plan.trained_roles:
            terms = [(batches[key], term) for key, term in run.plan.roles[name].terms if _learns_rows(term)]
            prefix = "heldout" if name == run.plan.policy else f"heldout/{name}"
            metrics |= {f"{prefix}/{metric}": value for metric, value in _measure(run, name, terms).items()}
        return metrics

    def _credit_rows(self, run: RunView) -> dict[str, Batch]:
        """This rank's held-out rows by credit key, with what their losses need."""
        rows = run.heldout(self.rows or None)
        whole = run.encoder.batch(rows, range(len(rows)))  # by every rank, so that all know the rows that are too long
        groups = whole.group_N.unique(return_inverse=True)[1]
        batch = whole.rows((groups % run.world.size == run.world.rank).nonzero().flatten())
        progress = max(1, run.step) / max(
            1, run.config.steps
        )  # not 0, where losses check the first rows they are trained on
        step = StepInfo(progress=progress, kl_coef=run.kl_coef)
        batch = prepare_rows(run.plan, replace(batch, world=run.world, step=step))
        batch = compute_needs(run.plan, run.roles, DATA, batch, trains=False)
        credited = {}
        with ExitStack() as stack:
            for spec in run.plan.credits.values():
                if spec.source != DATA or spec.after:
                    continue
                # opened anew: an evaluation leaves no trace in what the run's own has seen
                opened = open_provider(spec.advantage, "advantage") if spec.advantage is not None else None
                engine = stack.enter_context(opened) if opened is not None else None
                credited[spec.key], _ = assign_credit(run.plan, spec, batch, None, run.kl_coef, engine)
        return credited


def _learns_rows(term: Term) -> bool:
    """Return True if a term is trained on rows of data, with what is known before an update."""
    return term.source == DATA and not term.after


def _measure(run: RunView, role: str, terms: list[tuple[Batch, Term]]) -> dict[str, float]:
    """Return the sum of the weighted losses of a role, their own metrics, and the perplexity."""
    if not terms:
        return {}
    means, loss = Means(), 0.0
    for batch, term in terms:
        found = run.roles[role].infer(batch, term.outputs)
        outputs = {name: values.clone().requires_grad_() for name, values in found.items()}  # as a loss is used to
        version = run.roles[role].version
        if OLD in term.needs and OLD not in batch:  # the present weights count as the sampler of rows of data
            batch = with_live(batch, outputs["logprobs_NT"], version)
        result = check_loss_terms(term, term.loss(outputs, batch), batch)
        total = run.world.total(float(weighted_sum(result.values.detach(), result.reduction, batch)))
        loss += term.weight * total / max(run.world.total(count(result.reduction, batch, term.unit)), 1e-12)
        for name, metric in result.metrics.items():
            means.add_metric(name, metric)
        if term.advantage is None and term.unit == 1 and "logprobs_NT" in outputs:
            means.add("nll per token", *_nll(outputs["logprobs_NT"], batch))
    metrics = means.reduce(run.world if run.world.size > 1 else None)
    nll = metrics.pop("nll per token", None)
    return {
        "loss": loss,
        **metrics,
        **({} if nll is None else {"perplexity": exp(min(nll, 700.0))}),
    }  # beyond: no float


def _nll(logprobs_NT: Tensor, batch: Batch) -> tuple[float, float]:
    """Return the negative log-likelihood of the learned tokens, summed, and their number."""
    return -float(logprobs_NT.detach().double()[batch.mask_NT].sum()), float(batch.mask_NT.sum())
