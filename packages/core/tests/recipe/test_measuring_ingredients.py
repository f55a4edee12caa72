"""Ingredients that measure: scores with uncertainty, one good completion of four, and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli.app import main
from rlhf_core.contract.ingredients import Artifact
from rlhf_core.errors import DataError, OptionError
from rlhf_core.recipe.ingredients.evaluate import Evaluate
from rlhf_core.recipe.ingredients.plot import Plot
from rlhf_core.recipe.ingredients.reward_bench import RewardBench, rank_metrics
from rlhf_core.recipe.ingredients.score import Score, _whole_prompts
from rlhf_core.testing import TinyIngredientContext, check_ingredient


def write(path: Path, rows: list[dict[str, Any]]) -> Artifact:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Artifact("dataset", path)


def test_a_line_gets_the_uncertainty_that_the_reward_reports(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "def reward_func(completions):\n"
        "    lengths = [float(len(text)) for text in completions]\n"
        "    known = [None if text == 'abstain' else length for text, length in zip(completions, lengths)]\n"
        "    return {'rewards': known, 'extra_logs': {'uncertainty': [each / 2 for each in lengths], 'other': lengths}}\n"
    )
    rows = [{"prompt": "p", "completion": text} for text in ("a", "abc", "abstain")]
    write(tmp_path / "c.jsonl", rows)
    output = tmp_path / "scored.jsonl"
    words = ["score", str(tmp_path / "c.jsonl"), "--reward", "func", "--reward.path", str(tmp_path / "reward.py")]
    assert main([*words, "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["reward"], row["uncertainty"]) for row in found] == [(1.0, 0.5), (3.0, 1.5), (None, None)]
    assert "other" not in found[0]


@pytest.mark.parametrize(("n", "size"), [(1, 64), (4, 64), (5, 60), (48, 48), (100, 100)])
def test_completions_of_a_prompt_are_scored_together(n: int, size: int, tmp_path: Path) -> None:
    rows = write(tmp_path / "c.jsonl", [{"uid": uid, "prompt": "p", "completion": "c"} for uid in (0, 1)] * n)
    assert _whole_prompts(rows.path) == size


def test_a_score_step_needs_a_reward() -> None:
    Score({"reward": "length"}).check_inputs({"completions"})
    Score().check_inputs({"completions", "reward"})
    for settings in ({}, {"reward": {"dtype": "bfloat16"}}):
        with pytest.raises(
            OptionError, match=r"needs reward = \{use = \"NAME\"\}, or the step reads.reward = ARTIFACT"
        ):
            Score(settings).check_inputs({"completions"})
    with pytest.raises(OptionError, match="needs reward"):
        RewardBench().check_inputs({"rows"})
    evaluate = Evaluate({"evaluator": "heldout", "reward": {"dtype": "bfloat16"}})
    evaluate.check_inputs({"model", "reward"})
    with pytest.raises(OptionError, match="needs reward"):
        evaluate.check_inputs({"model"})
    Evaluate({"evaluator": "heldout"}).check_inputs({"model"})


def group(uid: int, rewards: list[float | None], good: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [{"uid": uid, "good": k < good, "reward": reward, **more} for k, reward in enumerate(rewards)]


@pytest.mark.parametrize(
    ("rewards", "good", "accuracy"),
    [
        ([4, 1, 2, 3], 1, 1.0),
        ([3, 1, 2, 4], 1, 0.0),
        ([2, 2, 2, 2], 1, 0.25),  # chance
        ([2, 2, 0, 0], 1, 0.5),
        ([0, 5, 4, 4], 2, 1.0),  # either of two good ones
        ([5, 5, 5, 0], 2, 2 / 3),
    ],
)
def test_a_prompt_is_right_if_its_best_is_good(rewards: list[float | None], good: int, accuracy: float) -> None:
    assert rank_metrics(group(0, rewards, good))["accuracy"] == pytest.approx(accuracy)


def test_accuracy_is_a_mean_over_prompts_by_subset() -> None:
    rows = [
        *group(0, [4, 1, 2, 3], subset="a"),
        *group(1, [0, 1, 2, 3], subset="a"),
        *group(2, [9, 1, 2, 3], subset="b"),
        *group(3, [None, 1, 2, 3], subset="b"),
    ]
    found = rank_metrics(rows)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["accuracy/a"] == 0.5 and found["accuracy/b"] == 1.0
    assert found["accuracy_se"] == pytest.approx((((1 / 3) ** 2 * 2 + (2 / 3) ** 2) / 2 / 3) ** 0.5)
    assert found["margin"] == pytest.approx((1 - 3 + 6) / 3) and (found["prompts"], found["left_out"]) == (3, 1)
    with pytest.raises(DataError, match="abstained"):
        rank_metrics(group(0, [None, 1, 2, 3]))


def test_one_good_completion_of_four(tmp_path: Path) -> None:
    rows = write(
        tmp_path / "bench.jsonl",
        [
            {"prompt": "p", "chosen": ["four"], "rejected": ["a", "ab", "abc"], "subset": "short"},
            {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": ["four", "ab", "abc"]},
        ],
    )
    bench = RewardBench({"reward": {"use": "length", "target": 4, "unit": "characters"}})
    (tmp_path / "made").mkdir()
    made = bench(TinyIngredientContext(tmp_path / "made", {"rows": rows}))
    found = json.loads(made["metrics"].path.read_text())
    assert (found["accuracy"], found["accuracy/short"], found["prompts"]) == (0.5, 1.0, 2.0)
    assert len(made["scored"].path.read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, r"bench\.jsonl:1: expected prompt, chosen and rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": []}, r"bench\.jsonl:1: expected at least one chosen and one"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = write(tmp_path / "bench.jsonl", [row])
    with pytest.raises(DataError, match=message):
        RewardBench({"reward": "length"})(TinyIngredientContext(tmp_path, {"rows": rows}))


def test_a_figure_of_a_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures come with rlhf-core[plot]")
    table = tmp_path / "table.csv"
    table.write_text("version,reward,reward_se,other\n0,0.5,0.1,\n1,0.75,0.1,3\n")
    plot = Plot(("reward", "other"), "reward per answer", ("PPO", "DPO"))
    check_ingredient(plot, {"table": Artifact("table", table)})
    (tmp_path / "made").mkdir()
    text = plot(TinyIngredientContext(tmp_path / "made", {"table": Artifact("table", table)}))[
        "figure"
    ].path.read_text()
    assert all(f">{word}</text>" in text for word in ("PPO", "DPO", "iteration", "reward per answer"))
    with pytest.raises(OptionError, match="'rewards' is not a column; the table has version, reward, reward_se, other"):
        Plot(("rewards",), "reward")(TinyIngredientContext(tmp_path, {"table": Artifact("table", table)}))
    table.write_text("version,reward\n0,much\n")
    with pytest.raises(DataError, match="contains 'much', which is not a number"):
        Plot(("reward",), "reward")(TinyIngredientContext(tmp_path, {"table": Artifact("table", table)}))


@pytest.mark.parametrize("options", [{"metrics": ()}, {"metrics": ("a", "b"), "names": ("A",)}])
def test_options_of_a_figure_fit_together(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Plot(label="reward", **options)
