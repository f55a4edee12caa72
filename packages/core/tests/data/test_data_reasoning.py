"""Procedural tasks are the same for the same seed, never shared by training and held-out rows, and verified."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Example, Rollouts
from rlhf_core.data.reasoning import ReasoningData
from rlhf_core.errors import UsageError
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.reasoning import ReasoningReward as Verifier

pytest.importorskip("reasoning_gym")


def answered(examples: list[Example], texts: list[str], reward: Verifier) -> Any:
    N = len(texts)
    ones = torch.ones(N, 1, dtype=torch.long)
    batch = Rollouts(
        prompts=["p"] * N,
        texts=texts,
        prompt_NL=ones,
        prompt_lengths_N=ones[:, 0],
        tokens_NT=ones,
        lengths_N=ones[:, 0],
        mask_NT=ones.bool(),
        group_N=torch.arange(N),
        labels=[example.label for example in examples],
        meta=[example.meta for example in examples],
        finish=["stop"] * N,
    )
    return to_reward_output(reward(batch), batch, reward)


def test_sums_are_verified_against_their_own_arithmetic() -> None:
    rows = list(ReasoningData(("chain_sum",), size=4)("train"))
    sums = [eval(re.search(r":\s*(.+?) =", str(row.prompt))[1]) for row in rows]  # type: ignore[index]
    texts = [f"Let me see. <answer>0</answer> no, <answer> {sums[0]} </answer>", f"<answer>{sums[1] + 1}</answer>"]
    texts += [str(sums[2]), "I do not know"]
    output = answered(rows, texts, Verifier())
    assert output.rewards_N[0] == 1
    assert output.rewards_N[1] < 0.5
    assert output.rewards_N[2:].tolist() == [0, 0]
    assert output.metrics["answered"].tolist() == [1, 1, 0, 0]
    assert answered(rows, texts, Verifier(anywhere=True)).rewards_N[2] == 1


def test_tasks_are_reproducible_and_held_out_ones_are_others() -> None:
    data = ReasoningData(("chain_sum", "leg_counting"), size=30, heldout=10, task_seed=3)
    train = [row.prompt for row in data("train")]
    heldout = [row.prompt for row in data("heldout")]
    assert (len(train), len(heldout)) == (60, 20)
    assert not set(train[30:]) & set(heldout[10:])
    assert train == [row.prompt for row in data("train")]
    assert {row.meta["datasource"] for row in data("train")} == {"chain_sum", "leg_counting"}
    assert str(train[0]).endswith("Give the final answer between <answer> and </answer>.")


def test_an_unknown_task_and_a_row_of_other_data_are_named() -> None:
    with pytest.raises(UsageError, match="no task 'chainsum' .*did you mean 'chain_sum'"):
        ReasoningData(("chainsum",))("train")
    with pytest.raises(UsageError, match="this row is not one"):
        answered([Example("a")], ["b"], Verifier())
