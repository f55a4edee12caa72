"""Tasks of a taskset written here: what the policy reads, and what it earns. verifiers itself plays them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from rlhf_core import Example, UsageError
from rlhf_core.testing import check_environment, check_light
from rlhf_environment_verifiers.environment import Verifiers


def test_the_package_is_light() -> None:
    check_light("rlhf_environment_verifiers.plugin", "rlhf_environment_verifiers.environment")


@pytest.fixture
def taskset(monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("verifiers.v1", reason="needs verifiers: pip install 'rlhf-environment-verifiers[verifiers]'")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delitem(sys.modules, "sums_taskset", raising=False)
    return "sums_taskset"


def test_tasks_are_read_answered_and_rewarded(taskset: str) -> None:
    """A tiny policy plays: its texts give the metric and the reward, whose weight is 2, by hand."""
    environment = Verifiers(taskset, options='{"first": 5}', log=("even", "letters"))
    played = check_environment(environment, [Example(f"row {i}") for i in range(6)])
    replies = [text.strip() for text in played.texts]
    assert played["environment/letters_N"].tolist() == [len(reply) for reply in replies]
    even = [1.0 - len(reply) % 2 for reply in replies]
    assert played["environment/even_N"].tolist() == even
    assert played["environment_rewards_NT"].sum(1).tolist() == [2.0 * each for each in even]
    assert len(set(even)) == 2
    assert played["turns_N"].tolist() == [1] * len(replies)
    read = [next(each for each in ("5+5=", "6+6=") if each in prompt) for prompt in played.prompts]
    assert set(read) == {"5+5=", "6+6="}
    for group in played.group_N.unique():
        assert len({read[i] for i in (played.group_N == group).nonzero()[:, 0]}) == 1, "completions share their task"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taskset": "no_such_taskset"}, "no_such_taskset"),
        ({"options": '{"unknown": 1}'}, "unknown"),
        ({"options": "{"}, "taskset sums_taskset with"),
        ({"harness": "no_such_harness"}, "no_such_harness"),
    ],
)
def test_what_is_missing_or_unknown_is_one_line(options: dict[str, str], message: str, taskset: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Verifiers(**{"taskset": taskset, **options}).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", ["refuse", "ignore"])
def test_requests_of_the_harness_are_answered_as_the_option_says(
    answer: Literal["refuse", "ignore"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_environment_verifiers.environment.Player", lambda _: SimpleNamespace(play=len))
    assert Verifiers("sums_taskset", request_sampling=answer).served().request_sampling == answer


def test_without_verifiers_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1.utils", None)
    with pytest.raises(UsageError, match=r"install rlhf-environment-verifiers\[verifiers\]"):
        Verifiers("sums_taskset").check()
