"""Tests of `RunView`: every member is documented and present."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_core import RunView
from rlhf_core.contract.providers import Evaluator
from rlhf_core.testing import tiny_run

ROOT = Path(__file__).resolve().parents[4]
MEMBERS = {name for name in vars(RunView) if not name.startswith("_")}


def test_the_documentation_lists_every_member_of_a_view_and_no_other() -> None:
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    section = text.partition("## The run that evaluators and observers see")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)(?:\([\w, ]*\))?` \|", section, re.MULTILINE)
    assert sorted(documented) == sorted(MEMBERS)


def test_every_member_of_a_view_says_what_it_is() -> None:
    for name in MEMBERS:
        assert inspect.getdoc(inspect.getattr_static(RunView, name)), name


@dataclass(frozen=True)
class Through(Evaluator):
    """An evaluator that gets at a run by the members of the view alone: anything else is an error."""

    def __call__(self, run: RunView) -> Mapping[str, float]:
        seen = {name: getattr(run, name) for name in MEMBERS}
        assert seen["step"] == len(seen["last_metrics"] and seen["samples"]) * run.config.steps
        prompts = run.encoder.prompts(run.heldout(2), [0, 1])
        rollouts = run.rollouts("actor", prompts, run.config.sampling)
        rewards_N = run.reward_of(rollouts).rewards_N
        return {"rewards": run.world.total(float(rewards_N.sum())), "count": float(len(rollouts))}


def test_an_evaluator_needs_nothing_of_a_run_but_its_view(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, evaluator=Through())
    run.train()
    assert [step for step, _ in run.evaluations] == [0, 2]
    assert run.evaluations[0][1]["eval/count"] == 2 * run.config.sampling.n
