"""Special tokens in rewards: hidden in `texts`, shown in `raw_texts`, to functions, regex and samples.jsonl."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import family

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.engines import open_provider
from rlhf_core.observer.files import sample_record
from rlhf_core.reward.func import Func
from rlhf_core.reward.regex import Regex
from rlhf_core.rollout.assemble import assemble

FORM = r"<think>.*</think>.+"
FUNCTION = """
def reward_func(raw_completions, completions, token_ids, finish):
    assert completions == ["so Yes.", "No."]
    assert raw_completions == ["<think>so</think> Yes.", "No."]
    assert finish == ["stop", "length"]
    return [float(len(ids)) for ids in token_ids]
"""


@pytest.fixture
def rollouts() -> Rollouts:
    """One completion with a thought that ended, and one that was cut."""
    tokenizer: Any = family("qwen thinking")
    tokens = [tokenizer.encode("<think>so</think> Yes.<|im_end|>"), tokenizer.encode("No.")]
    prompts = Prompts(["Hi"] * 2, [[5], [5]], [Example("Hi")] * 2, [1, 2])
    logprobs = [[-1.0] * len(row) for row in tokens]
    return assemble(prompts, tokens, ["stop", "length"], tokenizer, per_token={"sampler_logprobs_NT": logprobs})


def test_raw_texts_keep_special_tokens_but_for_the_end(rollouts: Rollouts) -> None:
    assert rollouts.texts == ["so Yes.", "No."]
    assert rollouts.raw_texts == ["<think>so</think> Yes.", "No."]
    assert rollouts.rows([1, 0]).raw_texts == rollouts.raw_texts[::-1]
    assert Rollouts.cat([rollouts, rollouts]).raw_texts == rollouts.raw_texts * 2
    for pair in ([rollouts, replace(rollouts, raw_texts=[])], [replace(rollouts, raw_texts=[]), rollouts]):
        assert Rollouts.cat(pair).rows([3, 0]).raw_texts == []


def test_functions_get_raw_texts_token_ids_and_the_kind_of_end_where_they_name_them(
    rollouts: Rollouts, tmp_path: Path
) -> None:
    (tmp_path / "reward.py").write_text(FUNCTION)
    with open_provider(Func(str(tmp_path / "reward.py"))) as engine:
        found = engine(rollouts).rewards_N.tolist()
    assert found == rollouts.lengths_N.tolist()


def test_a_format_of_special_tokens_is_matched_raw(rollouts: Rollouts) -> None:
    assert Regex(FORM)(rollouts) == [0.0, 0.0]
    assert Regex(FORM, raw=True)(rollouts) == [1.0, 0.0]


def test_samples_show_special_tokens(rollouts: Rollouts) -> None:
    assert sample_record(rollouts, 0)["completion"] == "<think>so</think> Yes."
