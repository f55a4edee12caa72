"""Completions that are sampled a slice at a time, so that new weights may arrive between two slices (partial rollouts).

A slice continues the prompt and everything sampled so far; token ids are never decoded and encoded again. Each token keeps the
log-probability and the version of the slice that sampled it. Any engine can do this: it sees prompts with one completion each.
One with a prefix cache reads again only what its new weights made stale.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.contract.options import turn_uid
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch
from rlhf_core.rollout.assemble import assemble

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PartialCompletion", "PartialGroup", "add_slice", "join_groups", "next_slice"]

VERSIONS = "versions_NT"


@dataclass
class PartialCompletion:
    """One completion, as far as it went."""

    k: int
    """number of the completion among its prompt's"""
    tokens: array[int] = field(default_factory=lambda: array("q"))
    numbers: dict[str, array[float]] = field(default_factory=dict)
    """numbers that the engine returned for each token, by name"""
    kept_sets: list[KeptSets] = field(default_factory=list)
    """kept sets of each slice, if the engine returned some"""
    slices: int = 0
    finish: Any = None
    """`stop` or `length`; None while it continues"""


@dataclass
class PartialGroup:
    """A prompt with its completions."""

    prompt: Prompts
    """one row"""
    completions: list[PartialCompletion]
    begun: int | None = None
    """steps that had been trained when its first slice was sampled; None before"""

    @property
    def is_complete(self) -> bool:
        """True if all completions have ended."""
        return all(each.finish is not None for each in self.completions)

    @property
    def uid(self) -> int:
        """The prompt's number."""
        return self.prompt.uids[0]


def next_slice(groups: Sequence[PartialGroup], most: int, length: int) -> tuple[Prompts, list[PartialCompletion]]:
    """Return the next request to an engine, a row per completion that continues, and these completions.

    Args:
        groups: in progress.
        most: tokens of a completion.
        length: tokens of a slice.
    """
    going = [(group, each) for group in groups for each in group.completions if each.finish is None]
    rows = _join_prompts([group.prompt for group, _ in going])
    prompts = replace(
        rows,
        token_ids=[[*group.prompt.token_ids[0], *each.tokens] for group, each in going],
        uids=[turn_uid(group.uid, each.k, each.slices) for group, each in going],
        limits=[min(length, most - len(each.tokens)) for _, each in going],
    )
    return prompts, [each for _, each in going]


def add_slice(going: Sequence[PartialCompletion], limits: Sequence[int], sampled: Rollouts, most: int) -> None:
    """Add what the engine sampled to the completions, in their order; what is longer than a limit is cut.

    Raises:
        ContractError: the engine returned rules as kept sets.
    """
    for i, (each, limit) in enumerate(zip(going, limits, strict=True)):
        whole = int(sampled.lengths_N[i])
        length = min(whole, limit)
        each.tokens.extend(sampled.tokens_NT[i, :length].tolist())
        for name, values in sampled.extras.items():
            if name.endswith("_NT"):
                each.numbers.setdefault(name, array("d")).extend(values[i, :length].tolist())
        if sampled.kept_sets:
            kept = sampled.kept_sets[i]
            if not isinstance(kept, KeptSets):
                raise ContractError("the rollout engine returned rules as kept sets of a slice: give sets, or none")
            each.kept_sets.append(kept.cut(length))
        each.slices += 1
        if sampled.finish[i] == "stop" and length == whole:
            each.finish = "stop"
        elif len(each.tokens) >= most:
            each.finish = "length"


def join_groups(groups: Sequence[PartialGroup], tokenizer: PreTrainedTokenizerBase, like: Rollouts) -> Rollouts:
    """Return whole groups as a batch; extras have the types of `like`, which the engine returned last."""
    completions = [each for group in groups for each in group.completions]
    names = [name for name in completions[0].numbers if name != VERSIONS]
    scalars = {}
    if "sampler_log_mass_NT" in names:
        mass = torch.tensor([value for each in completions for value in each.numbers["sampler_log_mass_NT"]])
        scalars["kept_mass"] = float(mass.exp().mean())
    rollouts = assemble(
        _join_prompts([group.prompt for group in groups]),
        [each.tokens for each in completions],
        [each.finish for each in completions],
        tokenizer,
        versions=[[int(version) for version in each.numbers[VERSIONS]] for each in completions],
        per_token={name: [each.numbers[name] for each in completions] for name in names},
        scalars=scalars,
        kept_sets=[KeptSets.join(each.kept_sets) for each in completions] if completions[0].kept_sets else (),
    )
    for name in names:
        rollouts.extras[name] = rollouts.extras[name].to(like[name].dtype)
    return rollouts


def _join_prompts(prompts: Sequence[Prompts]) -> Prompts:
    """Return the rows of several prompts as one."""
    names = [each.name for each in fields(Prompts)]
    return Prompts(**{name: [row for each in prompts for row in getattr(each, name)] for name in names})
