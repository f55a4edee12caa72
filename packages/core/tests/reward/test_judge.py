"""Grades of a language model: read from what it says, asked for once, and no number where it gives none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_reward_remote import rollouts, serving

from rlhf_core.contract.distributed import World
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import OptionError, UsageError
from rlhf_core.evaluator.win_rate import WinRate
from rlhf_core.reward.judge import Judge
from rlhf_core.reward.output import to_reward_output

__all__ = ["serving"]  # a fixture


def graded(body: dict[str, Any]) -> tuple[int, Any]:
    """A judge that likes long answers, up to ten."""
    answer = body["messages"][0]["content"].split("<answer>\n")[1].split("\n</answer>")[0]
    content = "I will not." if answer == "???" else f"Out of 10 I give {min(len(answer), 10)}"
    return 200, {"choices": [{"message": {"content": content}}]}


def test_a_judges_grades_are_mapped_to_0_and_1_and_asked_once(serving: Any, tmp_path: Path) -> None:
    server = serving(graded)
    judge = Judge((server.url,), "m", cache_file=str(tmp_path / "grades.jsonl"))
    assert judge(rollouts("a", "a" * 10, "abcd", "a")).rewards_N.tolist() == pytest.approx([0, 1, 1 / 3, 0])
    assert judge(rollouts("abcd")).rewards_N.tolist() == pytest.approx([1 / 3])
    assert len(server.asked) == 3
    assert server.asked[0]["model"] == "m"
    again = Judge((server.url,), "m", cache_file=judge.cache_file, parallel=2)  # another run with the same file
    assert again(rollouts("a")).rewards_N.tolist() == [0]
    assert len(server.asked) == 3
    with Path(judge.cache_file).open("a") as file:
        file.write('{"key": "half of a l')  # a run was killed here
    third = Judge((server.url,), "m", cache_file=judge.cache_file, parallel=3)
    assert third(rollouts("a", "ab")).rewards_N.tolist() == pytest.approx([0, 1 / 9])
    fourth = Judge((server.url,), "m", cache_file=judge.cache_file, parallel=4)
    assert fourth(rollouts("ab")).rewards_N.tolist() == pytest.approx([1 / 9])
    assert len(server.asked) == 4


def told(output: RewardOutput) -> list[float | None]:
    """The rewards, None where the judge abstains."""
    pairs = zip(output.rewards_N.tolist(), output.answered_N.tolist(), strict=True)
    return [reward if answered else None for reward, answered in pairs]


def test_a_judge_without_a_grade_abstains_or_falls_back_and_shows_the_first_answer(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = (serving(graded).url,)
    batch = rollouts("???", "abcd")
    with open_provider(Judge(url, "m")) as engine:
        for _ in range(2):
            output = to_reward_output(engine(batch), batch, engine)
            assert told(output) == [None, pytest.approx(1 / 3)]
            assert output.metrics == {}, "the share is reward/abstained"
    assert [record.getMessage() for record in caplog.records] == [
        "the judge gave no grade from 1 to 10: 'I will not.'; in this case the reward abstains"
    ]
    output = Judge(url, "m", fallback=0.25)(batch)
    assert told(output) == pytest.approx([0.25, 1 / 3])
    assert output.metrics["ungraded"].tolist() == [1, 0]
    assert caplog.messages[1].endswith("in this case the reward is 0.25")


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 7),
        ("7/10", 7),
        ("Grade: 7.5 / 10.", 7.5),
        ("I give it 3 out of 10", 3),
        ("3 Out Of 10.0", 3),
        ("Out of 10 I give 4", 4),
        ("2, no, 10", 10),
        ("1/2", 2),
        ("11", None),
        ("0", None),
        ("-3", None),
        ("none", None),
        ("", None),
        ("100/100", None),
    ],
)
def test_the_grade_is_the_last_number_on_the_scale(reply: str, grade: float | None) -> None:
    expected = None if grade is None else pytest.approx((grade - 1) / 9)
    assert Judge(("http://x",), "m").grade(reply) == expected


def test_a_scale_without_length_is_refused() -> None:
    for low, high in ((1.0, 1.0), (2.0, 1.0), (1.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(OptionError, match=r"^(high|low):? must be"):
            Judge(("http://x",), "m", low=low, high=high)


def test_a_pair_that_the_judge_cannot_grade_counts_in_no_win_rate(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four prompts: won, lost, ungraded on one side, ungraded on both. A 0 for no grade would give 0.375."""
    texts = {"actor": ("aaa", "a", "???", "???"), "reference": ("a", "aaa", "aa", "???")}
    sides = {name: rollouts(*each).with_extras(uids_N=torch.arange(4)) for name, each in texts.items()}
    monkeypatch.setattr(WinRate, "_sample", lambda _, run, name, rows, uids: sides[name])
    with open_provider(Judge((serving(graded).url,), "m")) as engine:
        run: Any = SimpleNamespace(
            world=World(),
            plan=SimpleNamespace(sources=("actor",), roles={"actor": None}),
            heldout=lambda most: [None] * 4,
            reward_of=lambda batch: to_reward_output(engine(batch), batch, engine),
        )
        metrics = WinRate()(run)
        assert metrics["win_rate"] == 0.5
        assert metrics["win_rate/reward"] == metrics["win_rate/reward_reference"] == pytest.approx(1 / 9)
        sides |= {name: rollouts("???").with_extras(uids_N=torch.arange(1)) for name in sides}
        run.heldout = lambda most: [None]
        assert WinRate()(run) == {}, "nothing is graded: there is no number"


def test_what_a_completion_says_does_not_reach_the_template(serving: Any) -> None:
    server = serving(graded)
    Judge((server.url,), "m")(rollouts("{label} {prompt}"))
    assert "<answer>\n{label} {prompt}\n</answer>" in server.asked[0]["messages"][0]["content"]


def test_an_endpoint_of_another_kind_is_named(serving: Any) -> None:
    with pytest.raises(UsageError, match="expected an OpenAI chat completion, not"):
        Judge((serving(lengths_of_nothing).url,), "m")(rollouts("a"))


def lengths_of_nothing(_: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"rewards": []}
