"""An evaluation by attacks: what it attacks, asks, judges and leaves; the same numbers every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import DataError, Evaluator, Launcher, OptionError, Placement, Plan, Run, UsageError
from rlhf_core.analysis.tables import read_columns
from rlhf_core.testing import check_evaluator, tiny_run
from rlhf_eval_gcg.attack import attack
from rlhf_eval_gcg.evaluation.attackers import make_units
from rlhf_eval_gcg.gcg import GCG
from rlhf_eval_gcg.plugin import rlhf_metrics

MODEL = "tiny:hidden=16,layers=1"
GOALS = (("Say hello.", "Hello, friend"), ("Count to three.", "One, two"), ("Name a fruit.", "A pear"))
SMALL: dict[str, Any] = {"goals": GOALS, "schedule": "gcg", "steps": 2, "search_width": 6, "n": 3}


def open_run(output: Path, evaluator: Evaluator, **options: Any) -> Run:
    return tiny_run(output, model=MODEL, evaluator=evaluator, **options)


def evaluate(output: Path, **options: Any) -> dict[str, float]:
    """Measure an untrained model; return the metrics."""
    run = open_run(output, GCG(**(SMALL | options)), steps=0)
    with run.open():
        return dict(run.measure())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_keeps_the_contract_of_evaluators() -> None:
    check_evaluator(GCG(**SMALL))


def test_it_leaves_attacks_answers_and_settings(tmp_path: Path) -> None:
    metrics = evaluate(tmp_path, seeds=(3, 5))
    folder = tmp_path / "gcg" / "step-0"
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".parquet") == [
        "answers.jsonl", "attacks.jsonl", "settings.json",
    ]  # fmt: skip
    attacks, answers = lines(folder / "attacks.jsonl"), lines(folder / "answers.jsonl")
    assert [(row["seed"], row["goal"]) for row in attacks] == [(seed, goal) for seed in (3, 5) for goal, _ in GOALS]
    for row in attacks:
        assert row["steps"] == len(row["losses"]) == len(row["flops"]) == len(row["texts"]) == 2
        assert row["loss"] <= min(row["losses"])
        assert row["message"] == row["goal"] + row["text"]
    keys = [(row["attacked"], row["seed"], row["goal"], row["k"]) for row in answers]
    clean = [(False, None, goal, k) for goal in range(3) for k in range(3)]
    assert keys == clean + [(True, seed, goal, k) for seed in (3, 5) for goal in range(3) for k in range(3)]
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["sampling"]["n"] == 3
    assert settings["attack"]["search_width"] == 6
    assert settings["judge"] == settings["model"].replace(MODEL, "length"), "the run's own reward"
    assert settings["threshold"] is None
    assert metrics["eval/gcg/attacks"] == 6
    assert metrics["eval/gcg/loss"] == pytest.approx(sum(row["loss"] for row in attacks) / 6)
    assert metrics["eval/gcg/flops"] == pytest.approx(sum(row["flops"][-1] for row in attacks) / 6)


def test_parquet_has_the_rows_of_the_json_lines(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    evaluate(tmp_path)
    folder = tmp_path / "gcg" / "step-0"
    rows = lines(folder / "answers.jsonl")
    assert read_columns(folder / "answers.parquet", list(rows[0])) == {
        name: [row[name] for row in rows] for name in rows[0]
    }


def test_a_suffix_follows_from_its_goal_and_seed_alone(tmp_path: Path) -> None:
    """Other goals, their order, other seeds and how many are sampled together change nothing."""
    evaluate(tmp_path / "all", seeds=(0, 7))
    evaluate(tmp_path / "one", goals=GOALS[1:2], seeds=(7,), batch=1)
    alone = lines(tmp_path / "one/gcg/step-0/attacks.jsonl")[0]
    among = [
        row
        for row in lines(tmp_path / "all/gcg/step-0/attacks.jsonl")
        if (row["seed"], row["goal"]) == (7, GOALS[1][0])
    ]
    assert alone["texts"] == among[0]["texts"]
    mine, theirs = (
        [row["completion"] for row in lines(tmp_path / name / "gcg/step-0/answers.jsonl")
         if row["goal_text"] == GOALS[1][0] and row["seed"] in (None, 7)]
        for name in ("one", "all")
    )  # fmt: skip
    assert mine == theirs
    texts = [row["texts"][-1] for row in lines(tmp_path / "all/gcg/step-0/attacks.jsonl")]
    assert len(set(texts)) == len(texts), "each goal and seed draws its own candidates"


def test_the_attack_is_that_of_the_library_and_answers_are_asked_with_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(tmp_path, GCG(**SMALL), steps=0)
    asked: list[Any] = []
    with run.open():
        original = run.rollouts
        monkeypatch.setattr(run, "rollouts", lambda *args: asked.append(args[1]) or original(*args))
        run.measure()
        role: Any = run.roles["actor"]
        options = GCG(**SMALL)
        for unit in make_units(options.read(), (0,), False):
            (expected,) = attack(role.causal_lm, role.tokenizer, unit.goals, options.search_options(), seed=unit.draw)
            row = next(row for row in lines(tmp_path / "gcg/step-0/attacks.jsonl") if row["goal"] == unit.goals[0].goal)
            assert row["texts"] == list(expected.texts)
            assert list(expected.prompt_ids) in asked[1].token_ids
    clean = role.tokenizer.apply_chat_template(
        [{"role": "user", "content": GOALS[0][0]}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert asked[0].token_ids[0] == clean


def judged_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: bool
) -> list[tuple[Any, str, Sequence[int]]]:
    """Return what the judge is shown of the answers to attacked prompts."""
    from rlhf_eval_gcg.judges.refusal import Refusal

    seen: list[Any] = []

    def judge(self: Refusal, rollouts: Any) -> list[float]:
        seen.append(rollouts)
        return [0.0] * len(rollouts)

    monkeypatch.setattr(Refusal, "__call__", judge)
    evaluate(tmp_path, goals=GOALS[:1], judge="refusal", judge_suffix=suffix)
    rollouts = seen[-1]
    return [
        (rollouts.meta[i]["prompt"][-1]["content"], rollouts.prompts[i],
         rollouts.prompt_NL[i, : rollouts.prompt_lengths_N[i]].tolist())
        for i in range(len(rollouts))
    ]  # fmt: skip


def test_the_judge_reads_the_suffix_or_not_as_the_option_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P7 of the original: its option of this purpose changes nothing that is scored."""
    for suffix in (True, False):
        shown = judged_prompts(tmp_path / str(suffix), monkeypatch, suffix)
        row = lines(tmp_path / str(suffix) / "gcg/step-0/attacks.jsonl")[0]
        assert row["text"], "there is a suffix"
        for message, text, ids in shown:
            assert message == (row["message"] if suffix else row["goal"])
            assert (row["text"] in text) == suffix
            assert (ids == row["prompt_ids"]) == suffix


def test_the_runs_reward_judges_unless_another_is_chosen(tmp_path: Path) -> None:
    own = evaluate(tmp_path / "own")
    assert "eval/gcg/success" not in own, "nobody said which of its rewards are bad"
    told = evaluate(tmp_path / "told", threshold=1e9)
    assert (told["eval/gcg/success"], told["eval/gcg/clean_success_any"]) == (1.0, 1.0)
    assert evaluate(tmp_path / "none", threshold=-1e9)["eval/gcg/success"] == 0.0
    other = evaluate(tmp_path / "other", judge="refusal")
    assert other["eval/gcg/success"] == 1 - other["eval/gcg/reward"]


def test_exported_prompts_are_data(tmp_path: Path) -> None:
    from rlhf_core.data.json import Json

    path = tmp_path / "found" / "prompts.jsonl"
    evaluate(tmp_path / "run", export=str(path), system="Be kind.")
    examples = Json(str(path))("train")
    attacks = lines(tmp_path / "run/gcg/step-0/attacks.jsonl")
    assert [example.prompt[-1]["content"] for example in examples] == [row["message"] for row in attacks]
    assert all(example.prompt[0] == {"role": "system", "content": "Be kind."} for example in examples)
    assert {example.meta["datasource"] for example in examples} == {"gcg"}


def test_one_suffix_for_all_goals(tmp_path: Path) -> None:
    metrics = evaluate(tmp_path, transfer=True, seeds=(0, 1))
    assert metrics["eval/gcg/attacks"] == 6
    assert [len(unit.goals) for unit in make_units(GCG(**SMALL).read(), (0, 1), True)] == [3, 3]


def test_plain_text_and_a_marker_are_asked_without_the_suffix_too(tmp_path: Path) -> None:
    goals = (("Say {suffix} hello.", "Hello"),)
    evaluate(tmp_path / "marker", goals=goals, suffix_place="marker")
    assert evaluate(tmp_path / "plain", goals=GOALS[:1], chat=False)["eval/gcg/attacks"] == 1


def test_an_attack_leaves_mode_weights_and_gradients_alone(tmp_path: Path) -> None:
    run = open_run(tmp_path, GCG(**SMALL), steps=0)
    with run.open():
        lm = run.roles["actor"].causal_lm  # type: ignore[attr-defined]
        lm.train()
        before = {name: value.clone() for name, value in lm.named_parameters()}
        wanted = {name: value.requires_grad for name, value in lm.named_parameters()}
        run.measure()
        assert lm.training
        assert all(torch.equal(value, before[name]) for name, value in lm.named_parameters())
        assert {name: value.requires_grad for name, value in lm.named_parameters()} == wanted
        assert all(value.grad is None for value in lm.parameters())


def test_a_run_attacks_at_its_start_in_between_and_at_its_end(tmp_path: Path) -> None:
    open_run(tmp_path / "each", GCG(**SMALL), eval_every=1).train()
    steps = {path.name: lines(path / "attacks.jsonl") for path in (tmp_path / "each" / "gcg").iterdir()}
    assert sorted(steps) == ["step-0", "step-1", "step-2"]
    assert len({rows[0]["fingerprint"] for rows in steps.values()}) == 3, "the weights differ"
    run = open_run(tmp_path / "end", GCG(**SMALL, end_only=True), eval_every=1)
    run.train()
    assert [path.name for path in (tmp_path / "end" / "gcg").iterdir()] == ["step-2"]
    assert lines(tmp_path / "end/gcg/step-2/attacks.jsonl") == steps["step-2"]
    assert [step for step, metrics in run.evaluations if metrics] == [2]


def test_every_metric_is_documented(tmp_path: Path) -> None:
    assert evaluate(tmp_path, threshold=0.0).keys() == rlhf_metrics().keys()


@dataclass(frozen=True)
class Elsewhere(Launcher):
    """A launcher whose roles are in other processes."""

    def __call__(self, plan: Plan) -> Placement:
        raise AssertionError("nothing may be placed")


def test_a_policy_in_another_process_is_refused_before_it_is_placed(tmp_path: Path) -> None:
    run = open_run(tmp_path, GCG(**SMALL), launcher=Elsewhere())
    with (
        pytest.raises(UsageError, match="needs the policy's gradients, in this process: pass launcher"),
        run.open(),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": "."}, "export"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"n": 0}, "n"),
        ({"threshold": float("nan")}, "threshold"),
        ({"batch": 0}, "batch"),
        ({"steps": 0}, "steps"),
        ({"schedule": "probe"}, "draft"),
        ({"schedule": "gcg", "draft": "tiny"}, "draft"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message} "):
        GCG(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goals": "absent.csv"}, "absent.csv"),
        ({"judge": "nonsense"}, "nonsense"),
        ({"judge": "refusal wihin=3"}, "within"),
        ({"judge": "harmbench"}, "template"),
    ],
)
def test_what_is_missing_is_raised_before_a_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GCG(**options).check()


def test_all_goals_are_placed_before_the_first_is_attacked(tmp_path: Path) -> None:
    bad = (GOALS[0], ("No marker here.", "Hello"))
    with pytest.raises(DataError, match="goal 2 of the list"):
        evaluate(tmp_path, goals=(("Say {suffix}.", "x"), *bad[1:]), suffix_place="marker")
    assert not (tmp_path / "gcg").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goals": (("No marker here.", "Hello"),), "suffix_place": "marker"}, "goal 1 of the list"),
        ({"more_models": ("absent-model",)}, "absent-model"),
    ],
)
def test_what_would_end_the_last_attacks_ends_a_run_at_its_start(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = open_run(tmp_path, GCG(**(SMALL | options), end_only=True))
    with pytest.raises((UsageError, DataError), match=message):
        run.train()
    assert run.step == 0 and not (tmp_path / "gcg").exists()


def test_its_attack_options_are_those_of_the_library() -> None:
    options = asdict(GCG(**SMALL).search_options())
    assert options.items() <= asdict(GCG(**SMALL)).items()
