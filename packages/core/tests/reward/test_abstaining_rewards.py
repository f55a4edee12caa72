"""A reward that answers None abstains: in each provider that takes answers from outside, and in a sum of several."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_basic import TWO, func
from test_reward_remote import rollouts, serving

from rlhf_core.cli import main
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import NotFiniteReward, UsageError
from rlhf_core.reward.func import Func
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.remote import Remote
from rlhf_core.reward.sum import Sum

__all__ = ["serving"]  # a fixture

ONE = "def reward_func(completions): return "


def answer(reward: Any, batch: Any = TWO) -> RewardOutput:
    """Return the checked rewards of `batch`."""
    with open_provider(reward) as engine:
        return to_reward_output(engine(batch), batch, reward)


def told(output: RewardOutput) -> list[float | None]:
    """The rewards, None where it abstains."""
    pairs = zip(output.rewards_N.tolist(), output.answered_N.tolist(), strict=True)
    return [reward if answered else None for reward, answered in pairs]


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ("[None, 2.0]", {}),
        ("{'rewards': [None, 2.0], 'scores': [None, 1.0], 'extra_logs': {'hits': [None, 3]}}", {}),
        ("[None, 2.0]", {"fallback": 7.0}),
        ("[None if c == 'one' else 2.0 for c in completions]", {"workers": 1, "batch": 1}),
    ],
    ids=["list", "dict", "fallback", "worker"],
)
def test_a_function_abstains_with_none(tmp_path: Path, body: str, options: dict[str, Any]) -> None:
    path = func(tmp_path, ONE + body).path
    output = answer(Func(path, **options))
    assert told(output) == [None, 2.0]
    if "fallback" in options:
        assert output.metrics["failed"].tolist() == [0, 0], "to abstain is not to fail"


def test_a_provider_abstains_in_a_list_or_by_name() -> None:
    nan_N = torch.tensor([math.nan, 2.0])
    named = RewardOutput(nan_N, scores_N=nan_N, abstained_N=torch.tensor([True, False]))
    for raw in ([None, 2.0], (None, torch.tensor(2.0)), named):
        output = to_reward_output(raw, TWO, None)
        assert told(output) == [None, 2.0] and output.total_N.tolist() == [0.0, 2.0]


def test_a_server_abstains_with_null(serving: Any) -> None:
    def lengths(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"rewards": [len(text) if len(text) > 1 else None for text in body["completions"]]}

    server = serving(lengths)
    assert told(answer(Remote((server.url,), batch=2), rollouts("a", "bb", "ccc"))) == [None, 2, 3]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{'rewards': [1.0] * N, 'scores': [None] * N}", "None among scores for a sample that has a reward"),
        (
            "{'rewards': [1.0] * N, 'extra_logs': {'hits': [None] * N}}",
            "None among hits for a sample that has a reward",
        ),
    ],
)
def test_only_rewards_abstain(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        answer(func(tmp_path, ONE + body.replace("N}", "len(completions)}").replace("* N", "* len(completions)")))


def test_nan_does_not_abstain(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteReward, match=r"rewards_N = nan for sample 1"):
        answer(func(tmp_path, ONE + "[None, float('nan')]"))


def test_a_part_that_abstains_leaves_the_sum_and_its_own_mean() -> None:
    """2 x [1, -, -] + 3 x [10, 20, -] is [32, 60, -]; weights are not shared out anew."""
    batch = rollouts("a", "b", "c")

    def one(completions: list[str]) -> Any:
        return {"rewards": [1.0, None, None], "extra_logs": {"hits": [5.0, None, None]}}

    def two(completions: list[str]) -> Any:
        return [10.0, 20.0, None]

    output = answer(Sum((one, two), (2.0, 3.0)), batch)
    assert told(output) == [32.0, 60.0, None]
    for name, values in {"one": [1.0], "one/hits": [5.0], "two": [10.0, 20.0]}.items():
        assert output.metrics[name][output.known[name]].tolist() == values, name


def test_rows_of_outputs_keep_who_abstained() -> None:
    """One part abstains and the other never does: joined and picked, each row has its own."""
    some = RewardOutput(
        torch.tensor([1.0, 0.0]),
        metrics={"x": torch.tensor([1.0, 0.0])},
        known={"x": torch.tensor([True, False])},
        abstained_N=torch.tensor([False, True]),
    )
    every = RewardOutput(torch.tensor([3.0]), metrics={"x": torch.tensor([3.0])})
    for parts, answered in (([every, some], [True, True, False]), ([some, every], [True, False, True])):
        joined = RewardOutput.cat(parts)
        assert joined.answered_N.tolist() == joined.known["x"].tolist() == answered
        picked = joined.rows([2, 1, 0])
        assert picked.answered_N.tolist() == picked.known["x"].tolist() == answered[::-1]


def test_equal_rewards_are_made_equal_beside_one_that_abstains() -> None:
    """Two rewards of a group differ by rounding; the third completion has none, and is no difference."""
    batch = rollouts("a", "b", "c")
    batch.group_N = torch.zeros(3, dtype=torch.long)
    output = to_reward_output([0.5, None, 0.5 + 6e-8], batch, None)
    assert output.rewards_N[0] == output.rewards_N[2] == pytest.approx(0.5)


def test_the_score_command_writes_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "p", "completion": text} for text in ("a", "bb")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("reward.py").write_text(
        ONE + "{'rewards': [None if c == 'a' else 2 for c in completions], 'scores': [1] * len(completions)}"
    )
    command = ["score", "rows.jsonl", "--reward", "func", "--reward.path", "reward.py"]
    for _ in range(2):  # the second time there is nothing left to do
        assert main(command) == 0
        found = [json.loads(line) for line in Path("rows.scored.jsonl").read_text().splitlines()]
        assert [(row["reward"], row["score"]) for row in found] == [(None, None), (2.0, 1.0)]
