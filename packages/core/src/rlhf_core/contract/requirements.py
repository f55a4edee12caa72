"""Needs: what an advantage or a loss reads from the batch, and which role's output provides it.

A provider says `needs = frozenset({"ref_logprobs_NT"})`; the loop computes that and nothing else, and the role exists
because of it. Any output of any role can be asked for as `"<role>.<output>"`, `"teacher.logprobs_NT"` say; the usual ones
have short names. Nothing is computed twice, and nothing whose value is at hand: with one optimiser step per batch the old
log-probabilities are the ones of the training forward pass itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.errors import UsageError

__all__ = ["GIVEN", "LANGUAGE", "OUTPUTS", "ROUTER_LOSS", "SHORT", "Need", "resolve"]

OUTPUTS = ("logprobs_NT", "entropy_NT", "logits_NT", "values_NT", "scores_N")
"""What a role's forward pass can give: per token log-probability, entropy and logit, per token value, per completion score."""

LANGUAGE = frozenset({"logprobs_NT", "entropy_NT", "logits_NT"})
"""Those of the language-model head."""

ROUTER_LOSS = "router_loss"
"""What balances the experts of a mixture of experts: one number for a whole forward pass, added by the role itself."""

GIVEN = frozenset({"sampler_logprobs_NT", "rewards_N", "rewards_NT", "scores_N", "advantages_NT", "returns_NT"})
"""Extras that come from sampling, rewards and credit, without a forward pass."""

TRAINED = "<trained>"
"""Stands for the role that the term trains."""

SHORT = {
    "old_logprobs_NT": f"{TRAINED}.logprobs_NT",
    "ref_logprobs_NT": "reference.logprobs_NT",
    "values_NT": "critic.values_NT",
}
"""Short names of the usual needs."""


@dataclass(frozen=True)
class Need:
    """One extra of a batch."""

    name: str
    """as the provider asks for it, and as the batch holds it"""
    role: str = ""
    """who computes it; empty if it is given"""
    output: str = ""
    """which of the role's outputs"""


def resolve(name: str, trained: str, asker: object, fields: frozenset[str] = frozenset()) -> Need:
    """The need called `name`, asked for by the provider `asker` in a term that trains `trained`.

    `fields` are the numbers that data rows carry (`margin_N`); they are given too, if the data has them.

    Raises:
        UsageError: nothing provides it.
    """
    full = SHORT.get(name, name)
    role, _, output = full.rpartition(".")
    if output in OUTPUTS and role:
        return Need(name, trained if role == TRAINED else role, output)
    if full in GIVEN or full in fields or full.endswith("_N"):  # other `_N` names are data columns, checked when read
        return Need(name)
    known = ", ".join(sorted({*SHORT, *GIVEN}))
    raise UsageError(
        f"{type(asker).__name__} needs {name!r}, which nothing provides; known are {known}, '<role>.<output>' with output "
        f"one of {', '.join(OUTPUTS)}, and numeric data columns as '<column>_N'"
    )
