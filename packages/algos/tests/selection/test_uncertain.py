"""The reward `uncertain` against its formula on the model's own features, and its mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_algos.advantage.optimistic import OptimisticPairs
from rlhf_algos.one_pass import Omd
from rlhf_algos.reward.uncertain import UncertainReward
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.engines import open_provider
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch
from rlhf_core.util.tensor_tree import write_tree

MODEL = "tiny:hidden=16,layers=1"
TEXTS = ["a good answer", "bad", "another one", "alone", "two words"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the estimator of 30 pairs, and the folder of a reward model beside it."""
    folder = tmp_path_factory.mktemp("run")
    write_state(folder, 16)
    return folder


def write_state(folder: Path, d: int) -> Omd:
    estimator = Omd(d)
    estimator.step(torch.randn(30, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    (folder / "roles" / "reward").mkdir(parents=True)
    write_tree(
        folder / "roles" / "reward" / "optimizer.safetensors", {"optimizer": {"state": {0: estimator.state_dict()}}}
    )
    return estimator


def rollouts() -> Rollouts:
    """Completions of three prompts, one of which has a single completion."""
    batch = make_batch([1] * 5, groups=[4, 4, 4, 6, 7])
    return replace(batch, texts=list(TEXTS), meta=[{"prompt": f"prompt {group}"} for group in batch.group_N.tolist()])


def scored(state: Path, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The output, and the model's own scores and features."""
    with open_provider(UncertainReward(MODEL, state=str(state), **options)) as engine:
        output = engine(rollouts())
        prompts = [meta["prompt"] for meta in rollouts().meta]
        found, _ = engine.infer(prompts, TEXTS, frozenset({"scores_N", "features_NH"}))
    return output, found["scores_N"], found["features_NH"].double()


def matrix(state: Path) -> torch.Tensor:
    from rlhf_algos.one_pass.store import load_estimator

    return load_estimator(state).curvature.solve(torch.eye(16, dtype=torch.float64))


def test_the_uncertainty_is_that_of_the_difference_to_the_prompt_s_mean(state: Path) -> None:
    output, scores_N, features_NH = scored(state)
    inverse_DD = matrix(state)
    center = features_NH[:3].mean(0)
    differences = [*(features_NH[:3] - center), features_NH[3], features_NH[4]]
    expected = [float((z @ inverse_DD @ z).sqrt()) for z in differences]
    assert output.metrics["uncertainty"].tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(output.rewards_N, scores_N)
    whole, _, _ = scored(state, against="zero", scale=2.0)
    expected = [2 * float((z @ inverse_DD @ z).sqrt()) for z in features_NH]
    assert whole.metrics["uncertainty"].tolist() == pytest.approx(expected, rel=1e-5)


def test_optimism_adds_and_pessimism_takes_away_what_is_uncertain(state: Path) -> None:
    plain, scores_N, _ = scored(state, mean=0.1, std=0.5)
    std_N = plain.metrics["uncertainty"]
    normal, _, _ = scored(state)
    torch.testing.assert_close(std_N, normal.metrics["uncertainty"] / 0.5)
    torch.testing.assert_close(plain.rewards_N, (scores_N - 0.1) / 0.5)
    optimistic, _, _ = scored(state, mean=0.1, std=0.5, mode="bonus", bonus=1.5)
    torch.testing.assert_close(optimistic.rewards_N, plain.rewards_N + 1.5 * std_N)
    pessimistic, _, _ = scored(state, mean=0.1, std=0.5, mode="pessimistic", beta=3.0)
    torch.testing.assert_close(pessimistic.rewards_N, plain.rewards_N - std_N.square() / 6)
    assert torch.equal(pessimistic.metrics["score"], plain.metrics["score"]), "the score itself is logged as it is"


def test_a_pair_selector_reads_it(state: Path) -> None:
    output, _, _ = scored(state)
    credit = OptimisticPairs(beta=50.0)(output, rollouts(), {})
    assert credit.rows is not None
    assert len(credit.rows) == 2


def test_a_state_that_does_not_fit_is_refused_in_one_line(state: Path, tmp_path: Path) -> None:
    write_state(tmp_path, 8)
    with (
        pytest.raises(UsageError, match=r"the state has 8 features, but the model .* has 16"),
        open_provider(UncertainReward(MODEL, state=str(tmp_path))),
    ):
        pass
    with (
        pytest.raises(UsageError, match="has no valid checkpoint"),
        open_provider(UncertainReward(MODEL, state=str(tmp_path / "none"))),
    ):
        pass
    for options in ({"beta": 0.0}, {"bonus": -1.0}, {"scale": 0.0}):
        with pytest.raises(UsageError, match="must be in"):
            UncertainReward(MODEL, **options)
