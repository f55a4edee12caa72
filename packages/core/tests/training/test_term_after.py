"""A term that comes `after` a role reads it with its new weights, in the same step; others read what was before any update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core import (
    AdamW,
    Algorithm,
    ModelOptions,
    ProviderChoices,
    Registry,
    Run,
    RunView,
    Term,
    TrainedOptions,
    UsageError,
    hookimpl,
    make_config,
)
from rlhf_core.contract.terms import update_order
from rlhf_core.testing.tiny_algorithm import TinyAdvantage, TinyAlgorithm, TinyLoss

MODEL = "tiny:hidden=16,layers=1"


@dataclass(frozen=True)
class Reading(TinyAdvantage):
    """A credit that reads another trained role; its own numbers are those of its base."""

    needs: ClassVar[frozenset[str]] = frozenset({"prm.logprobs_NT"})


@dataclass(frozen=True)
class ReadAfter(Algorithm):
    """A policy whose credit reads a role that learns from the same samples."""

    after: str = "prm"
    prm_after: str = ""
    every: int = 1

    defaults: ClassVar[Mapping[str, str]] = TinyAlgorithm.defaults
    roles: ClassVar[Mapping[str, ModelOptions]] = dict.fromkeys(("actor", "prm"), TrainedOptions(optim=AdamW(lr=1e-2)))

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (
            Term("actor", "actor", TinyLoss(), Reading(), after=self.after),
            Term("prm", "actor", TinyLoss(), TinyAdvantage(), after=self.prm_after, every=self.every),
        )


class Watcher:
    """Records of the policy's credit inputs, and of the role's outputs for these tokens before and after the update."""

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []
        self.updates: list[str] = []
        self.batch: Any = None

    @hookimpl
    def rlhf_rollouts_ready(self, run: RunView, source: str, rollouts: Any) -> None:
        self.batch = rollouts
        self.before.append(self.infer(run))

    @hookimpl
    def rlhf_before_update(self, role: str) -> None:
        self.updates.append(role)

    @hookimpl
    def rlhf_step_end(self, run: RunView) -> None:
        key = next(key for key, spec in run.plan.credits.items() if isinstance(spec.advantage, Reading))
        self.read.append(run.samples[key]["prm.logprobs_NT"])
        self.after.append(self.infer(run))

    def infer(self, run: RunView) -> torch.Tensor:
        return run.roles["prm"].infer(self.batch, frozenset({"logprobs_NT"}))["logprobs_NT"]


def run_of(output: Path, algorithm: Algorithm, registry: Registry | None = None, **options: Any) -> Run:
    small: dict[str, Any] = {"model": MODEL, "batch_size": 2, "steps": 2, "output": str(output)}
    return Run(make_config(algorithm, sampling={"n": 2, "max_new_tokens": 4}, **(small | options)), registry)


def watched(output: Path, algorithm: Algorithm, **options: Any) -> Watcher:
    watcher, registry = Watcher(), Registry()
    registry.register(watcher, "watcher")
    run_of(output, algorithm, registry, **options).train()
    return watcher


def test_a_term_reads_the_new_weights_of_the_role_it_comes_after(tmp_path: Path) -> None:
    seen = watched(tmp_path, ReadAfter())
    assert seen.updates == ["prm", "actor"] * 2, "though the actor's term comes first"
    for read, before, after in zip(seen.read, seen.before, seen.after, strict=True):
        torch.testing.assert_close(read, after, atol=1e-6, rtol=0)
        assert float((read - before).abs().max()) > 1e-3


def test_without_after_all_credit_is_assigned_before_any_update(tmp_path: Path) -> None:
    seen = watched(tmp_path, ReadAfter(after=""))
    assert seen.updates == ["actor", "prm"] * 2
    for read, before, after in zip(seen.read, seen.before, seen.after, strict=True):
        torch.testing.assert_close(read, before, atol=1e-6, rtol=0)
        assert float((read - after).abs().max()) > 1e-3


def test_a_role_that_rests_is_not_waited_for(tmp_path: Path) -> None:
    plan = run_of(tmp_path, ReadAfter(every=2)).plan
    assert plan.for_step(1).trained_roles == ("actor",) and plan.for_step(2).trained_roles == ("prm", "actor")
    seen = watched(tmp_path / "run", ReadAfter(every=2))
    torch.testing.assert_close(seen.read[0], seen.before[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.read[1], seen.after[1], atol=1e-6, rtol=0)


def test_several_passes_over_a_batch_come_after_all_passes_of_the_other_role(tmp_path: Path) -> None:
    seen = watched(tmp_path, ReadAfter(), update_epochs=2)
    torch.testing.assert_close(seen.read[0], seen.after[0], atol=1e-6, rtol=0)


def test_updates_are_ordered_by_after_and_else_by_terms() -> None:
    terms = [Term(role, "data", TinyLoss()) for role in "abc"]
    assert update_order(terms) == ("a", "b", "c")
    assert update_order([replace(terms[0], after="c"), *terms[1:]]) == ("b", "c", "a")
    assert update_order([replace(terms[0], after="b"), replace(terms[1], after="c"), terms[2]]) == ("c", "b", "a")


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            ReadAfter(prm_after="actor"),
            "the updates of actor and prm wait for each other: change `after` of their terms",
        ),
        (
            ReadAfter(after="poet"),
            "ReadAfter: the term that trains actor on samples of actor waits for the update of 'poet', which no term",
        ),
        (ReadAfter(after="actor"), "waits for the update of 'actor', which it trains itself; change its `after`"),
    ],
)
def test_an_order_that_cannot_be_is_refused_in_planning(tmp_path: Path, algorithm: Algorithm, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_of(tmp_path, algorithm)
