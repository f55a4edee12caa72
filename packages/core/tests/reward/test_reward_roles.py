"""Rewards, advantages and losses bring roles of their own: models that are placed and configured as any other role's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import Given, Judged, NewActor, OtherJudge, PerToken, Surprise, TextJudged

from rlhf_core import ContractError, Run, UsageError, make_config
from rlhf_core.cli import main
from rlhf_core.config.builder import from_names, to_names
from rlhf_core.reward.model import RewardModel, RewardModelEngine
from rlhf_core.testing import run_ranks
from rlhf_core.testing.tiny_algorithm import TinyAlgorithm

MODEL = "tiny:hidden=16,layers=1"


def run_of(output: Path, **options: Any) -> Run:
    small: dict[str, Any] = {"model": MODEL, "batch_size": 2, "steps": 2, "output": str(output)}
    sampling = {"n": 2, "max_new_tokens": 4}
    return Run(make_config(TinyAlgorithm(), sampling=sampling, **(small | options)))


def rows(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time", "speed", "memory"))} for line in lines
    ]


def scorer_of(folder: Path, seed: int) -> str:
    """A folder with a sequence classifier."""
    run = run_of(folder / "run", reward=Judged(), judge={"model": f"{MODEL},seed={seed}"})
    with run.place():
        run.roles["judge"].export(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return scorer_of(tmp_path_factory.mktemp("scorer"), 3)


def test_a_role_that_reads_texts_scores_as_the_reward_model_provider_does(scorer: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, reward=TextJudged(), judge={"model": scorer})
    with run.open():
        prompts = run.encoder.prompts(list(run.data.rows)[:3], [0, 1, 2])
        rollouts = run.rollouts("actor", prompts, run.config.sampling)
        expected, _ = RewardModelEngine(RewardModel(scorer)).score(
            [meta["prompt"] for meta in rollouts.meta], rollouts.texts
        )
        torch.testing.assert_close(run.reward_of(rollouts).rewards_N, expected, atol=1e-6, rtol=0)
        assert len(set(expected.tolist())) > 1


def test_a_placed_reward_model_scores_as_one_in_the_process_of_the_loop(scorer: str, tmp_path: Path) -> None:
    own = run_of(tmp_path / "own", reward={"use": "model", "model": scorer, "mean": 0.25, "std": 2.0})
    placed = run_of(
        tmp_path / "placed", reward={"use": "model_role", "mean": 0.25, "std": 2.0}, reward_model={"model": scorer}
    )
    assert placed.plan.roles["reward_model"].outputs == {"scores_N"} and not placed.plan.roles["reward_model"].trained
    own.train()
    placed.train()
    for one, other in zip(rows(tmp_path / "own"), rows(tmp_path / "placed"), strict=True):
        names = one.keys() - {"padding", "reward/cut"}
        assert {name: other[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-6)
        assert one["reward/score"] != one["reward/mean"]


def test_several_placed_reward_models_are_weighted_and_added_up(scorer: str, tmp_path: Path) -> None:
    """The independent source: each of the two models alone, as the reward of the same completions."""
    other = scorer_of(tmp_path / "other", 5)
    run = run_of(
        tmp_path / "both",
        reward={"use": "model_roles", "weights": (2.0, -0.5)},
        reward_model={"model": scorer},
        reward_model_2={"model": other},
    )
    with run.open():
        prompts = run.encoder.prompts(list(run.data.rows)[:3], [0, 1, 2])
        rollouts = run.rollouts("actor", prompts, run.config.sampling)
        found = run.reward_of(rollouts)
    alone: list[torch.Tensor] = []
    for model in (scorer, other):
        single = run_of(tmp_path / str(len(alone)), reward="model_role", reward_model={"model": model})
        with single.open():
            alone.append(single.reward_of(rollouts).rewards_N)
    torch.testing.assert_close(found.rewards_N, 2.0 * alone[0] - 0.5 * alone[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.metrics["reward_model_2"], alone[1], atol=1e-6, rtol=0)
    assert float((alone[0] - alone[1]).abs().min()) > 1e-4, "the models differ"


def test_weights_of_reward_models_are_one_for_each(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 3 numbers for the 2 roles reward_model, reward_model_2$"):
        run_of(tmp_path, reward={"use": "model_roles", "weights": (1.0, 2.0, 3.0)})


def test_a_placed_reward_model_without_a_score_head_is_refused(tmp_path: Path) -> None:
    policy = run_of(tmp_path / "policy")
    policy.train()
    run = run_of(tmp_path / "run", reward="model_role", reward_model={"model": str(policy.output / "model")})
    with pytest.raises(UsageError, match="has no trained score head, so its scores would be random"):
        run.train()


def test_a_role_reads_the_sampled_tokens_unless_the_reward_says_otherwise(scorer: str, tmp_path: Path) -> None:
    """The independent source: transformers' classifier on prompt and completion, without padding."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    run = run_of(tmp_path, reward=Judged(), judge={"model": scorer})
    assert run.plan.roles["judge"].reads
    with run.open():
        rollouts = run.rollouts("actor", run.encoder.prompts(list(run.data.rows)[:2], [0, 1]), run.config.sampling)
        rewards_N = run.reward_of(rollouts).rewards_N
    for i, reward in enumerate(rewards_N.tolist()):
        prompt = rollouts.prompt_NL[i, : rollouts.prompt_lengths_N[i]]
        ids = torch.cat([prompt, rollouts.tokens_NT[i, : rollouts.lengths_N[i]]])
        hidden = model.model(ids[None]).last_hidden_state[0, -1]
        assert reward == pytest.approx(float(model.score(hidden).detach()), abs=1e-5)


def test_its_options_have_flags_a_table_and_the_way_back(tmp_path: Path) -> None:
    run = run_of(tmp_path, reward=Judged(), judge={"dtype": "bfloat16"})
    assert run.plan.roles["judge"].options.dtype == "bfloat16" and run.plan.roles["judge"].outputs == {"scores_N"}
    tree = to_names(run.config)
    assert tree["judge"]["model"] == "tiny:hidden=16,layers=1,seed=3"
    assert from_names(tree).roles == run.config.roles


def test_an_advantage_brings_a_role_to_an_algorithm_that_has_none(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", advantage=Surprise())
    run.train()
    (batch,) = run.samples.values()
    expected = -batch["rewards_N"][:, None] * batch["judge.logprobs_NT"] * batch.mask_NT
    torch.testing.assert_close(batch["advantages_NT"], expected)


def test_two_ranks_have_the_numbers_of_one(tmp_path: Path) -> None:
    run_of(tmp_path / "one", reward=TextJudged(), advantage=Surprise()).train()
    words = [
        "rlhf_core.testing.tiny_algorithm:TinyAlgorithm",
        "--reward",
        "judged:TextJudged",
        "--advantage",
        "judged:Surprise",
    ]
    words += ["--model", MODEL]
    words += ["--batch-size", "2", "--steps", "2", "--sampling.n", "2", "--sampling.max-new-tokens", "4"]
    done = run_ranks(2, main, [*words, "--output", str(tmp_path / "two")])
    assert not any(rank.code for rank in done), done[-1].stderr[-3000:]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        names = [name for name in one if name != "padding"]
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"reward": Judged(), "advantage": OtherJudge()},
            ContractError,
            "both define a role 'judge'; rename one of them",
        ),
        ({"advantage": NewActor()}, ContractError, "both define a role 'actor'; rename one of them"),
        (
            {"reward": PerToken()},
            UsageError,
            "needs 'judge.logprobs_NT', but a reward can only read numbers per completion of its own",
        ),
        (
            {"reward": Given()},
            UsageError,
            "needs 'advantages_NT', but a reward can only read outputs of roles, as <role>.<output>",
        ),
        (
            {"reward": "sum", "reward.parts": ("judged:Judged",)},
            UsageError,
            "Judged reads roles, which a part of reward sum cannot; choose it as the only reward",
        ),
    ],
)
def test_roles_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "reward.parts" in options:
        options = {"reward": {"use": "sum", "parts": ["judged:Judged"]}}
    with pytest.raises(error, match=message):
        run_of(tmp_path, **options).check()


def test_a_reward_and_an_advantage_may_share_a_role(tmp_path: Path) -> None:
    plan = run_of(tmp_path, reward=Judged(), advantage=Surprise()).plan
    assert plan.roles["judge"].outputs == {"scores_N", "logprobs_NT"}
