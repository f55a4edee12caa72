"""Rewards that check an answer: exact, pattern, JSON, mathematics, profanity and unit tests, each against plain cases."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import DataError, MissingPackage, UsageError
from rlhf_core.reward.code import Code, program
from rlhf_core.reward.exact import ExactMatch
from rlhf_core.reward.maths import Maths
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.profanity import Profanity
from rlhf_core.reward.reasoning import ReasoningReward
from rlhf_core.reward.regex import Regex
from rlhf_core.reward.valid_json import ValidJson


def output(reward: Any, *pairs: tuple[str, Any]) -> RewardOutput:
    """The checked output for (completion, label) pairs."""
    N = len(pairs)
    ones = torch.ones(N, 1, dtype=torch.long)
    batch = Rollouts(
        prompts=["p"] * N,
        texts=[text for text, _ in pairs],
        prompt_NL=ones,
        prompt_lengths_N=ones[:, 0],
        tokens_NT=ones,
        lengths_N=ones[:, 0],
        mask_NT=ones.bool(),
        group_N=torch.arange(N),
        labels=[label for _, label in pairs],
        meta=[{}] * N,
        finish=["stop"] * N,
    )
    return to_reward_output(reward(batch), batch, reward)


def score(reward: Any, text: str, label: Any = None) -> float:
    return float(output(reward, (text, label)).rewards_N[0])


@pytest.mark.parametrize(
    ("options", "text", "label", "expected"),
    [
        ({}, " Paris\n", "paris", 1),
        ({"ignore_case": False}, "Paris", "paris", 0),
        ({}, "Paris, France", "Paris", 0),
        ({}, "B", ["A", "b"], 1),
        ({}, "42", 42, 1),
        ({"extract": r"answer: (\w+)"}, "answer: no, wait, answer: yes", "yes", 1),
        ({"extract": r"\d+"}, "7 then 8", "8", 1),
        ({"extract": r"\d+"}, "none", "8", 0),
    ],
)
def test_exact(options: dict[str, Any], text: str, label: Any, expected: float) -> None:
    assert score(ExactMatch(**options), text, label) == expected


@pytest.mark.parametrize(
    ("pattern", "match", "text", "expected"),
    [
        ("<t>.*</t>.+", "whole", "<t>a\nb</t> c\n", 1),
        ("<t>.*</t>", "whole", "x <t></t>", 0),
        ("<t>.*</t>", "anywhere", "x <t></t>", 1),
        ("sorry", "none", "I am sorry", 0),
        ("sorry", "none", "fine", 1),
    ],
)
def test_regex(pattern: str, match: Any, text: str, expected: float) -> None:
    assert score(Regex(pattern, match), text) == expected


def test_a_pattern_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match=r"pattern '\(' is not a regular expression"):
        score(Regex("("), "")
    with pytest.raises(UsageError, match=r"pattern '\(' is not a regular expression"):
        Regex("(").check()  # before models are loaded
    Regex("x").check()


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, '{"a": [1, 2.5e3, null]}', 1),
        ({}, "{'a': 1}", 0),
        ({}, '{"a": NaN}', 0),
        ({}, '{"a": 1} and more', 0),
        ({}, "[" * 100_000, 0),
        ({}, '```json\n{"a": 1}\n```', 1),
        ({"fenced": False}, '```json\n{"a": 1}\n```', 0),
        ({"keys": ("a", "b")}, '{"a": 1, "b": 2, "c": 3}', 1),
        ({"keys": ("a", "b")}, '{"a": 1}', 0),
        ({"keys": ("a",)}, '["a"]', 0),
    ],
)
def test_valid_json(options: dict[str, Any], text: str, expected: float) -> None:
    assert score(ValidJson(**options), text) == expected


MATHS: list[tuple[str, str, str, float]] = [
    ("any", "So 48 / 2 = 24 and 48 + 24 = 72.\n#### 72", "48/2 = 24\n#### 72", 1),
    ("any", "#### 1,234", "#### 1234", 1),
    ("any", "The answer is 72.", "#### 72", 1),
    ("any", "The answer is 73.", "#### 72", 0),
    ("any", r"so \boxed{\frac{1}{2}}", "0.5", 1),
    ("any", r"so \boxed{x^2 + 2x + 1}", "$(x+1)^2$", 1),
    ("any", r"first \boxed{3}, no, \boxed{4}", r"\boxed{4}", 1),
    ("any", "I do not know", "4", 0),
    ("boxed", "The answer is 72.", "72", 0),
    ("boxed", r"\boxed{72}", "72", 1),
    ("marked", r"\boxed{72}", "72", 0),
    ("marked", "#### 72\nHuman: next", "72", 1),
]


def test_mathematics_is_compared_by_value_and_where_it_counts() -> None:
    pytest.importorskip("math_verify")
    for where in ("any", "boxed", "marked"):
        cases = [(text, label, right) for w, text, label, right in MATHS if w == where]
        result = output(Maths(where=where), *((text, label) for text, label, _ in cases))
        assert result.rewards_N.tolist() == [right for *_, right in cases]


def test_an_answer_that_cannot_be_compared_is_wrong_and_a_label_without_answer_an_error() -> None:
    pytest.importorskip("math_verify")
    reward = Maths(timeout=1.0)
    result = output(reward, ("$9^{9^{9^{9}}}$", "3"), ("3", "3"))
    assert result.rewards_N.tolist() == [0, 1]
    assert result.metrics["gave_up"].tolist() == [1, 0]
    with pytest.raises(DataError, match="the label '' contains no answer"):
        output(reward, ("3", ""))
    reward.close()


def test_a_sample_without_label_is_named_before_anything_is_compared() -> None:
    pytest.importorskip("math_verify")
    for name, reward in (("exact", ExactMatch()), ("math", Maths())):
        with pytest.raises(DataError) as caught:
            output(reward, ("3", "3"), ("4", None))
        assert str(caught.value) == (
            f"reward {name} needs labels: pass data.label_key; there is none for sample 1, prompt 'p', completion '4'"
        )


@pytest.mark.parametrize(
    ("reward", "package", "extra"),
    [
        (Maths(), "math_verify", "math"),
        (Profanity(), "profanity_check", "profanity"),
        (ReasoningReward(), "reasoning_gym", "reasoning"),
    ],
)
def test_a_missing_package_is_said_before_the_run_starts(
    reward: Any, package: str, extra: str, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match=rf"pip install 'rlhf-core\[{extra}\]'"):
        reward.check()


@pytest.mark.filterwarnings("ignore")
def test_insults_are_more_profane_than_compliments() -> None:
    pytest.importorskip("profanity_check")
    rude, kind = output(
        Profanity(), ("You are a stupid bastard.", None), ("What a lovely day.", None)
    ).rewards_N.tolist()
    assert -1 <= rude < -0.8
    assert -0.2 < kind <= 0


ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]


def test_programs_are_judged_by_their_tests() -> None:
    programs = [
        (f"Here it is:\n```python\n{ADD}\n```\nDone.", TESTS),
        (ADD.replace("+", "-"), TESTS),
        ("def add(a, b): return 3", TESTS),
        ("this is no program", TESTS),
        ("import os; os._exit(0)", TESTS),
        (ADD, "assert add(1, 2) == 3\nassert add(2, 2) == 4"),
        ("print(int(input()) + 1)", {"inputs": ["1", "2"], "outputs": ["2", "4"]}),
    ]
    result = output(Code(), *programs)
    assert result.rewards_N.tolist() == [1, 0, 0, 0, 0, 1, 0]
    assert result.metrics["tests_passed"].tolist() == [1, 0, 0.5, 0, 0, 1, 0.5]
    assert output(Code(partial=True), *programs).rewards_N.tolist() == [1, 0, 0.5, 0, 0, 1, 0.5]


def test_the_last_fenced_block_is_the_program() -> None:
    assert program("```\na\n```\ntext\n```python\nb\n```") == "b\n"
    assert program("no fence") == "no fence"


@pytest.mark.parametrize(
    "label", [None, [], 3, [1], {"inputs": []}, {"inputs": ["1"], "outputs": []}, [{"input": "1"}]]
)
def test_a_label_that_is_no_test_is_an_error(label: Any) -> None:
    with pytest.raises(DataError, match="a label should be test code, a list of test codes, or inputs and outputs"):
        score(Code(), ADD, label)


def test_a_test_that_is_no_python_is_an_error() -> None:
    with pytest.raises(DataError, match=r"the test in a label is not Python \(.*never closed.*'assert add\('"):
        score(Code(), ADD, ["assert add(1, 2) == 3", "assert add("])
