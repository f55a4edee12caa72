"""The evaluators, against enumeration and numbers worked by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.cli import main
from rlhf_core.contract.distributed import World
from rlhf_core.contract.providers import Evaluator
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.evaluator.pass_at_k import PassAtK, pass_at_k
from rlhf_core.evaluator.policy_stats import PolicyStats
from rlhf_core.evaluator.preference import Preference
from rlhf_core.testing.tiny import tiny_rollouts, tiny_run


def run_with(rollouts: Any, **more: Any) -> Any:
    """A run that answers with `rollouts`, whatever is asked."""
    from rlhf_core.contract.options import Sampling

    return SimpleNamespace(
        world=World(),
        plan=SimpleNamespace(sources=("actor",), roles={"actor": None}, trained_roles=("actor",)),
        config=SimpleNamespace(sampling=Sampling(), seed=0),
        heldout=lambda most: [SimpleNamespace(completions=("a", "b"))] * 2,
        encoder=SimpleNamespace(prompts=lambda rows, uids: None, batch=lambda rows, uids: rollouts),
        rollouts=lambda *_: rollouts,
        **more,
    )


def role(**outputs: torch.Tensor) -> Any:
    return SimpleNamespace(infer=lambda batch, names: {name: outputs[name] for name in names})


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: int, k: int) -> None:
    subsets = list(combinations([i < right for i in range(5)], k))
    assert pass_at_k(5, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_split_by_data_source() -> None:
    """Two prompts, four samples: 1 right and 2 right. pass@1 = 1/4, 1/2; pass@2 = 1 - 3/6, 1 - 1/6."""
    rollouts = tiny_rollouts(2, 4)
    rollouts.meta = [{"datasource": "a"}] * 4 + [{"datasource": "b"}] * 4
    scores_N = torch.tensor([1.0, 0.9, 0, 0, 1, 0, 0, 1])
    run = run_with(rollouts, reward_of=lambda _: RewardOutput(torch.zeros(8), None, scores_N))
    metrics = PassAtK(k=2, n=4)(run)
    assert metrics["pass@1"] == pytest.approx(0.375) and metrics["pass@2"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert metrics["pass@2/a"] == pytest.approx(1 / 2) and metrics["pass@2/b"] == pytest.approx(5 / 6)
    assert metrics["pass@1_se"] == pytest.approx(0.125)  # |1/4 - 1/2| / 2, for two values


def test_preference_counts_pairs_by_scores_and_by_implicit_rewards() -> None:
    """Margins of implicit rewards: pair 0 gains 3 * 0.1, pair 1 is a tie: accuracy (1 + 0.5) / 2."""
    rollouts = tiny_rollouts(2, 2)
    rollouts.mask_NT = torch.zeros_like(rollouts.mask_NT)
    rollouts.mask_NT[:, :3] = True
    ref_NT = torch.full(rollouts.mask_NT.shape, -1.0)
    now_NT = ref_NT.clone()
    now_NT[0] += 0.1
    run = run_with(rollouts, roles={"actor": role(logprobs_NT=now_NT), "reference": role(logprobs_NT=ref_NT)})
    metrics = Preference()(run)
    assert metrics["preference/accuracy"] == 0.75 and metrics["preference/accuracy_se"] == pytest.approx(0.25)
    assert metrics["preference/margin"] == pytest.approx(0.15)
    run.roles = {"actor": role(scores_N=torch.tensor([2.0, 1, 3, 4]))}
    assert Preference(by="scores")(run)["preference/accuracy"] == 0.5


def test_policy_stats_sum_the_log_ratio_over_sampled_tokens() -> None:
    rollouts = tiny_rollouts(1, 2)
    now_NT, ref_NT = (torch.full(rollouts.mask_NT.shape, value) for value in (-1.0, -1.5))
    run = run_with(rollouts, roles={"actor": role(logprobs_NT=now_NT), "reference": role(logprobs_NT=ref_NT)})
    metrics = PolicyStats()(run)
    tokens = rollouts.mask_NT.sum(1).double()
    assert metrics["policy/kl"] == pytest.approx(0.5 * float(tokens.mean()))
    assert metrics["policy/kl_token"] == pytest.approx(torch.tensor(-0.5).exp().item() - 1 + 0.5)
    assert metrics["policy/truncated"] == 0.5 and metrics["policy/length_max"] == float(rollouts.lengths_N.max())


def test_a_model_is_no_distance_from_itself_and_prefers_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "datasource": "x"} for i in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", "json", "--data.path", str(pairs), "--data.heldout", "2", "--output", str(tmp_path / "out")]
    flags += ["--sampling.max-new-tokens", "3"]
    assert main(["eval", "tiny", "--evaluator", "policy_stats", *flags]) == 2
    assert "pass --reference.model, for example with the model" in capsys.readouterr().err, (
        "nobody means the model itself without saying so"
    )
    itself = ["--reference.model", "tiny"]
    assert main(["eval", "tiny", "--evaluator", "policy_stats,preference", *itself, *flags]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["eval/policy/kl"] == 0 and metrics["eval/preference/accuracy"] == 0.5
    assert main(["eval", "tiny", "--evaluator", "preference", "--evaluator.by", "scores", *flags]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["eval/preference/accuracy"] <= 1


@pytest.mark.parametrize(("rows", "most", "few"), [(1, 64, 1), (9, 1, 1), (3, None, 3)])
def test_held_out_rows_are_the_first_ones_and_without_any_the_error_is_one_line(
    rows: int, most: int | None, few: int, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run")
    run.data.engines = {"data": lambda split: [SimpleNamespace(number=i) for i in range(rows)]}  # type: ignore[assignment]
    assert [row.number for row in run.heldout(most)] == list(range(few))  # type: ignore[attr-defined]
    run.data.engines = {"data": lambda split: []}  # type: ignore[assignment]
    with pytest.raises(UsageError, match="^the data has no held-out rows"):
        run.heldout(most)


def test_a_win_is_a_higher_reward_on_the_same_prompt_and_a_tie_counts_half(tmp_path: Path) -> None:
    """Rewards of three prompts, two completions each: 1 > 0, 2 = 2 | 0 < 1, 3 > 1 | 0 < 5, 1 < 2."""
    from rlhf_core.evaluator.win_rate import WinRate

    rewards = {"actor": [1.0, 2, 0, 3, 0, 1], "reference": [0.0, 2, 1, 1, 5, 2]}
    rollouts = {name: tiny_rollouts(3, 2).with_extras(uids_N=torch.tensor([0, 0, 1, 1, 2, 2])) for name in rewards}
    for name, batch in rollouts.items():
        batch.meta = [{"datasource": "ab"[i // 4]} for i in range(6)]
        batch.extras["rewards_N"] = torch.tensor(rewards[name])
    evaluator = WinRate(n=2)
    run = run_with(None, reward_of=lambda batch: RewardOutput(batch["rewards_N"]))
    run.heldout = lambda most: [None] * 3
    object.__setattr__(evaluator, "_sample", lambda run, name, rows, uids: rollouts[name])
    metrics = evaluator(run)
    assert metrics["win_rate"] == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    assert metrics["win_rate/a"] == pytest.approx(0.625) and metrics["win_rate/b"] == 0.0
    assert metrics["win_rate/reward"] == pytest.approx(7 / 6)

    def by_token(batch: Any) -> RewardOutput:
        first_NT = (torch.arange(batch.mask_NT.shape[1]) == 0) * batch["rewards_N"][:, None]
        return RewardOutput(torch.zeros(len(batch)), first_NT)

    run.reward_of = by_token
    assert evaluator(run) == metrics, "a reward given token by token is one"
    assert metrics["win_rate/reward_reference"] == pytest.approx(11 / 6)


@pytest.mark.parametrize(("precision", "expected"), [(1e-6, 0.75), (1e-2, 0.5)])
def test_rewards_that_differ_by_rounding_are_a_tie(precision: float, expected: float) -> None:
    """Margins of 5e-7 and 5e-3 of rewards near 2: the first is rounding in float32, both are in bfloat16."""
    from rlhf_core.evaluator.win_rate import WinRate

    rewards = {"actor": [2.0000005, 2.005], "reference": [2.0, 2.0]}
    sides = {name: tiny_rollouts(2, 1).with_extras(uids_N=torch.tensor([0, 1])) for name in rewards}
    for name, batch in sides.items():
        batch.extras["rewards_N"] = torch.tensor(rewards[name])
    run = run_with(None, reward_of=lambda batch: RewardOutput(batch["rewards_N"], precision=precision))
    run.heldout = lambda most: [None] * 2
    evaluator = WinRate()
    object.__setattr__(evaluator, "_sample", lambda run, name, rows, uids: sides[name])
    assert evaluator(run)["win_rate"] == expected


def test_the_eval_command_compares_two_models_of_different_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other model has more tokens, which no text of the first becomes; it answers in its own."""
    words = ["eval", "tiny", "--evaluator", "win_rate", "--evaluator.prompts", "3", "--reward", "length"]
    words += ["--sampling.max-new-tokens", "3", "--output", str(tmp_path), "--reference.model"]
    assert main([*words, "tiny"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/win_rate"] == 0.5, (
        "a model against itself, with the same random numbers"
    )
    assert main([*words, "tiny:vocab=300"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["eval/win_rate"] <= 1


@dataclass(frozen=True)
class Constant(Evaluator):
    """Measures a number that it is told."""

    value: float

    def __call__(self, run: Any) -> dict[str, float]:
        return {"constant": self.value}


def test_a_metric_that_two_evaluators_measure_ends_the_run(tmp_path: Path) -> None:
    """The number of the second would replace that of the first."""
    run = tiny_run(tmp_path, steps=0, evaluator=[Constant(1.0), Constant(2.0)])
    with run.open(), pytest.raises(UsageError, match=r"Constant\.2 measures eval/constant, as another"):
        run.measure()
