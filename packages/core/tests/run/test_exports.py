"""OUTPUT/model is the policy that an algorithm declares, in any order of its terms; other roles are exported on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import AutoModelForCausalLM

from rlhf_core import (
    AdamW,
    Algorithm,
    ModelOptions,
    ProviderChoices,
    Run,
    Term,
    TrainedOptions,
    UsageError,
    make_config,
)
from rlhf_core.testing.tiny_algorithm import TinyAdvantage, TinyAlgorithm, TinyLoss
from rlhf_core.util.tensor_tree import read_tree


@dataclass(frozen=True)
class ScoutFirst(Algorithm):
    """A scout, whose terms come first, and an actor."""

    exports: tuple[str, ...] = ()

    policy: ClassVar[str] = "actor"
    defaults: ClassVar[Mapping[str, str]] = TinyAlgorithm.defaults
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=1e-3)),
        "scout": TrainedOptions(optim=AdamW(lr=1e-2)),
        "failed": TrainedOptions(),
    }

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (
            Term("scout", "scout", TinyLoss(), TinyAdvantage()),
            Term("actor", "actor", TinyLoss(), TinyAdvantage()),
            *(Term("failed", "actor", TinyLoss(), TinyAdvantage()) for name in self.exports if name == "failed"),
        )


@dataclass(frozen=True)
class NoPolicy(ScoutFirst):
    policy: ClassVar[str] = "poet"


def run_of(output: Path, algorithm: Algorithm, **options: Any) -> Run:
    small: dict[str, Any] = {"model": "tiny:hidden=16,layers=1", "batch_size": 2, "steps": 2, "output": str(output)}
    return Run(make_config(algorithm, sampling={"n": 2, "max_new_tokens": 4}, **(small | options)))


def difference(folder: Path, checkpoint: Path) -> float:
    """The largest difference between an exported model and the weights of a role in a checkpoint."""
    exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    trained = read_tree(checkpoint / "module.safetensors")
    return max(float((exported[name] - trained[f"model.{name}"]).abs().max()) for name in exported)


def test_the_policy_is_exported_though_another_role_is_trained_first(tmp_path: Path) -> None:
    run_of(tmp_path, ScoutFirst(exports=("scout",)), steps=2).train()
    roles = tmp_path / "checkpoints" / "step-2" / "roles"
    assert difference(tmp_path / "model", roles / "actor") == 0 < difference(tmp_path / "model", roles / "scout")
    assert difference(tmp_path / "scout", roles / "scout") == 0
    assert "tiny:hidden=16,layers=1" in (tmp_path / "scout" / "README.md").read_text(encoding="utf-8")


def test_metrics_of_the_policy_have_no_name_in_front(tmp_path: Path) -> None:
    metrics = run_of(tmp_path, ScoutFirst()).train().metrics
    assert {"reward/mean", "scout/reward/mean"} <= metrics.keys()
    assert "actor/reward/mean" not in metrics


def test_the_policys_tokenizer_reads_the_data(tmp_path: Path) -> None:
    assert run_of(tmp_path, ScoutFirst()).plan.tokenizer_role == "actor"


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            NoPolicy(),
            "NoPolicy: the policy is the role 'poet', which no term trains .trained: scout, actor.; let the algo",
        ),
        (
            ScoutFirst(("judge",)),
            "ScoutFirst exports the role 'judge', which no term trains; leave it out of `exports`",
        ),
        (
            ScoutFirst(("failed",)),
            "ScoutFirst exports the role 'failed' to OUTPUT/failed, which the run uses for itself",
        ),
    ],
)
def test_a_policy_or_an_export_that_cannot_be_is_refused_in_planning(
    tmp_path: Path, algorithm: Algorithm, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_of(tmp_path, algorithm)
