"""The calculator calculates, its words are masked, what gets the right answer becomes likelier, and runs are the same resumed
and on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf_core import DataError, Example, make_config
from rlhf_core.testing import check_environment, check_light
from rlhf_environment_calculator.environment import Calculator, evaluate

RANKS = Path(__file__).with_name("calculator_ranks.py")
sys.path.append(str(RANKS.parent))
import calculator_ranks  # noqa: E402  the module that the ranks run


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_keeps_the_contract() -> None:
    check_light("rlhf_environment_calculator.plugin", "rlhf_environment_calculator.environment")
    check_environment(Calculator(call_reward=0.1), turns=("2+2=", "nonsense=", "It is 4"))


@pytest.mark.parametrize("text", ["2+3", "2*(3-7)/4", "-5 + 1.25", "(1/3)*3", "10-2-3"])
def test_values_are_those_of_python(text: str) -> None:
    assert float(evaluate(f"I think that {text}") or 0) == pytest.approx(eval(text))


@pytest.mark.parametrize("text", ["", "2+", "1/0", "2**3", "__import__('os')", "1" * 101])
def test_what_is_no_arithmetic_has_no_value(text: str) -> None:
    assert evaluate(text) is None


def test_a_third_is_exact() -> None:
    assert evaluate("1/3") == Fraction(1, 3)


def test_a_label_that_is_no_number_is_one_line() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: the label is None, not a number; pass --data.label-key"):
        Calculator()(Example("2+3?", origin="rows.jsonl:1"), seed=0)


def test_a_run_with_it_is_rewarded_by_it() -> None:
    assert (
        make_config("grpo", environment="rlhf_environment_calculator.environment:Calculator").names["reward"]
        == "environment"
    )


def test_only_what_the_policy_wrote_is_trained_on(tmp_path: Path) -> None:
    """The transcript by hand: `2+3=` 5 ` so 5`, twice as long for hard exercises, and the guess 9."""
    run = calculator_ranks.run(tmp_path, output=str(tmp_path / "run"), steps=1, batch_size=8)
    batch = run.samples["actor"]
    seen = set()
    for i in range(len(batch)):
        tokens, mask = batch.tokens_NT[i], batch.mask_NT[i]
        length = int(batch.lengths_N[i])
        whole = bytes(token for token in tokens[:length].tolist() if token < 256)
        mine = bytes(token for token in tokens[mask].tolist() if token < 256)
        seen.add((batch.prompts[i][:4], whole, mine))
        assert not batch["advantages_NT"][i][~mask].any()
        assert batch.texts[i] == mine.decode()
    assert seen == {
        ("Easy", b"2+3=5 so 5", b"2+3= so 5"),
        ("Hard", b"2+3=5, 4*5=20 so 5", b"2+3=, 4*5= so 5"),
        ("Easy", b"9", b"9"),
        ("Hard", b"9", b"9"),
    }
    (row,) = metrics(tmp_path / "run")
    assert row["reward/mean"] == 0.5  # those who asked are right, those who guessed are wrong
    assert row["reward/calls"] == 0.75  # 1 and 2 of those who asked


def test_asking_becomes_likelier_than_guessing(tmp_path: Path) -> None:
    run = calculator_ranks.run(tmp_path, output=str(tmp_path / "run"), steps=8, batch_size=8)
    batch = run.samples["actor"]
    now_NT = run.roles["actor"].infer(batch, frozenset({"logprobs_NT"}))["logprobs_NT"]
    before = calculator_ranks.run(tmp_path, output=str(tmp_path / "start"), steps=1, actor={"optim": {"lr": 0.0}})
    then_NT = before.roles["actor"].infer(batch, frozenset({"logprobs_NT"}))["logprobs_NT"]
    gained_N = ((now_NT - then_NT) * batch.mask_NT).sum(1) / batch.mask_NT.sum(1)
    right = batch["rewards_N"] == 1
    assert gained_N[right].min() > gained_N[~right].max()


def test_a_resumed_run_equals_a_straight_one(tmp_path: Path) -> None:
    calculator_ranks.run(tmp_path, output=str(tmp_path / "straight"))
    calculator_ranks.run(tmp_path, output=str(tmp_path / "run"), steps=2)
    calculator_ranks.run(tmp_path, output=str(tmp_path / "run"), resume=True)
    straight, found = metrics(tmp_path / "straight"), metrics(tmp_path / "run")
    assert [row["loss/actor"] for row in found] == [row["loss/actor"] for row in straight]
    assert [row["completion/turns"] for row in found] == [row["completion/turns"] for row in straight]


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Ranks draw different exercises, so that one of them may need another turn while the other is done."""
    calculator_ranks.run(tmp_path, output=str(tmp_path / "one"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, RANKS, tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "ranks"), strict=True):
        for name in ("loss/actor", "reward/mean", "completion/turns"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4)
