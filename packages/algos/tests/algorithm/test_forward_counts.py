"""Exact counts of forward passes: pairs in one pass, no repeated computation, no reference without a penalty."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Batch
from rlhf_core.loop import collect, credit, update
from rlhf_core.strategy.torch import TorchTrainable

ROWS, SAMPLES = 4, 3
ONLINE: dict[str, Any] = {
    "data": "prompts",
    "reward": {"use": "length", "target": 2},
    "sampling": {"n": SAMPLES, "max_new_tokens": 4},
}
TRUNCATED: dict[str, Any] = {"sampling": {"n": SAMPLES, "max_new_tokens": 4, "top_p": 0.9}}
"""The trainer replays what sampling kept, so that the engine's log-probabilities are the policy's."""
WHOLE = {"sampling": TRUNCATED["sampling"] | {"replay": "off"}}
"""Then the engine's log-probabilities are those of another distribution, and are no substitute for the policy's."""

NO_KL, KL_LOSS, KL_REWARD = ({"coef": 0.0}, {"coef": 0.1, "where": "loss"}, {"coef": 0.1, "where": "reward"})
SAMPLED = ROWS * SAMPLES


def passes(algorithm: str | dict[str, Any], output: Path, **options: Any) -> dict[tuple[str, bool, int], int]:
    """Count the forward passes of a step after sampling, by (role, with a graph, rows); all are in eval mode."""
    small: dict[str, Any] = {"model": "tiny:hidden=16,layers=1", "batch_size": ROWS, "steps": 1, "output": str(output)}
    run, seen = Run(make_config(algorithm, **(small | options))), Counter[tuple[str, bool, int]]()
    original = TorchTrainable.forward

    def forward(self: TorchTrainable, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        (name,) = (name for name, role in run.roles.items() if role.trainable is self)  # type: ignore[attr-defined]
        assert not any(module.training for module in self.module.modules())
        seen[name, torch.is_grad_enabled(), len(batch)] += 1
        return original(self, batch, names)

    with run.open(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTrainable, "forward", forward)
        iteration = next(run.iterations(collect))
        update(run, iteration, credit(run, iteration))
    return dict(seen)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text('{"prompt": "Say a.", "chosen": "a", "rejected": "bbb"}\n' * 8)
    return {"data": {"use": "json", "path": str(path)}}


def test_supervised_training_reads_each_row_once(pairs: dict[str, Any], tmp_path: Path) -> None:
    data = {"data": pairs["data"] | {"completion_key": "chosen"}}
    assert passes("sft", tmp_path, **data) == {("actor", True, ROWS): 1}


def test_both_sides_of_a_pair_are_one_pass(pairs: dict[str, Any], tmp_path: Path) -> None:
    assert passes("reward", tmp_path / "reward", **pairs) == {("reward", True, 2 * ROWS): 1}
    found = passes("dpo", tmp_path / "dpo", **pairs)
    assert found == {("reference", False, 2 * ROWS): 1, ("actor", True, 2 * ROWS): 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, {("actor", True, SAMPLED): 1}, id="on-policy"),
        pytest.param(
            {"update_epochs": 2},
            {("actor", True, SAMPLED): 2},
            id="two passes: the sampler's own log-probabilities are old",
        ),
        pytest.param({"minibatches": 2}, {("actor", True, SAMPLED // 2): 2}, id="two minibatches"),
        pytest.param(TRUNCATED, {("actor", True, SAMPLED): 1}, id="truncated on-policy: the live ones are old"),
        pytest.param(
            {"update_epochs": 2, **TRUNCATED},
            {("actor", True, SAMPLED): 2},
            id="truncated, two passes: the sampler's own log-probabilities are old",
        ),
        pytest.param(
            {"update_epochs": 2, **WHOLE},
            {("actor", False, SAMPLED): 1, ("actor", True, SAMPLED): 2},
            id="truncated without replay, two passes: old ones are computed",
        ),
    ],
)
@pytest.mark.parametrize(("kl", "reference"), [(NO_KL, 0), (KL_LOSS, 1)], ids=["no KL", "KL in the loss"])
def test_group_relative_training(
    options: dict[str, Any], expected: dict[Any, int], kl: dict[str, Any], reference: int, tmp_path: Path
) -> None:
    found = passes({"use": "grpo", "kl": kl}, tmp_path, **(ONLINE | options))
    assert found == expected | ({("reference", False, SAMPLED): 1} if reference else {})


ACTOR_CRITIC = {("actor", True, SAMPLED): 1, ("critic", True, SAMPLED): 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, ACTOR_CRITIC, id="values are those of the training pass"),
        pytest.param(TRUNCATED, ACTOR_CRITIC, id="truncated: the penalty reads the training pass"),
        pytest.param(
            {"minibatches": 2},
            {("actor", True, SAMPLED // 2): 2, ("critic", False, SAMPLED): 1, ("critic", True, SAMPLED // 2): 2},
            id="two minibatches: values are old in the second",
        ),
    ],
)
@pytest.mark.parametrize(("kl", "reference"), [(NO_KL, 0), (KL_REWARD, 1)], ids=["no KL", "KL in the reward"])
def test_actor_and_critic(
    options: dict[str, Any], expected: dict[Any, int], kl: dict[str, Any], reference: int, tmp_path: Path
) -> None:
    found = passes({"use": "ppo", "kl": kl}, tmp_path, **(ONLINE | {"update_epochs": 1, "minibatches": 1} | options))
    assert found == expected | ({("reference", False, SAMPLED): 1} if reference else {})
