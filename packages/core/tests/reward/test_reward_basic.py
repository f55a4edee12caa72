"""Functions, lengths and sentiment as rewards, and the check that every reward passes through."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import ContractError, MissingPackage, UsageError
from rlhf_core.reward.calls import read_columns
from rlhf_core.reward.func import Func
from rlhf_core.reward.length import Length
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.sentiment import Sentiment, _analyser


def rollouts(*texts: str, labels: list[Any] | None = None) -> Rollouts:
    """Completions of the prompts `p0 `, `p1 `, …; token counts are word counts plus EOS."""
    lengths_N = torch.tensor([len(text.split()) + 1 for text in texts])
    mask_NT = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    N = len(texts)
    return Rollouts(
        prompts=[f"p{i} " for i in range(N)],
        texts=list(texts),
        prompt_NL=torch.zeros(N, 1, dtype=torch.long),
        prompt_lengths_N=torch.ones(N, dtype=torch.long),
        tokens_NT=mask_NT.long(),
        lengths_N=lengths_N,
        mask_NT=mask_NT,
        group_N=torch.arange(N),
        labels=labels or [f"l{i}" for i in range(N)],
        meta=[{"row": i} for i in range(N)],
        finish=["stop"] * N,
    )


TWO = rollouts("one", "two words")


def func(folder: Path, body: str, name: str = "reward_func") -> Func:
    """A reward file with this text."""
    path = folder / f"{folder.name}_{name}.py"
    path.write_text(body)
    return Func(str(path), name)


def scores(reward: Any, batch: Rollouts = TWO) -> list[float]:
    numbers: list[float] = to_reward_output(reward(batch), batch, reward).rewards_N.tolist()
    return numbers


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def reward_func(queries, prompts, labels): return [len(q) for q in queries]", [6, 12]),
        ("def reward_func(q, p, l): return [len(a) - len(b) + int(c[1]) for a, b, c in zip(q, p, l)]", [3, 10]),
        ("import torch\ndef reward_func(queries, prompts, labels): return torch.tensor([1, 2])", [1, 2]),
        ("def reward_func(prompts, completions, **kwargs): return [m['row'] for m in kwargs['meta']]", [0, 1]),
        ("def reward_func(completions): return [len(c) for c in completions]", [3, 9]),
        ("def reward_func(completions, scale=2.0): return [scale * len(c) for c in completions]", [6, 18]),
        ("async def reward_func(queries, prompts, labels): return [1.0, 0.0]", [1, 0]),
        ("class R:\n  def __call__(self, labels): return [int(l[1]) for l in labels]\nreward_func = R()", [0, 1]),
    ],
    ids=["openrlhf", "other names", "tensor", "keywords", "completions", "default", "async", "object"],
)
def test_a_function_gets_what_it_names(tmp_path: Path, body: str, expected: list[float]) -> None:
    assert scores(func(tmp_path, body)) == expected


def test_a_dict_carries_rewards_scores_and_logs(tmp_path: Path) -> None:
    logs = "{'rewards': [2, 3], 'scores': [0, 1], 'extra_logs': {'hits': [4, 5]}}"
    body = f"def reward_func(queries, prompts, labels): return {logs}"
    output = to_reward_output(func(tmp_path, body)(TWO), TWO, None)
    assert output.scores_N is not None
    assert (output.rewards_N.tolist(), output.scores_N.tolist()) == ([2, 3], [0, 1])
    assert output.metrics["hits"].tolist() == [4, 5]


def test_a_function_of_an_installed_module_is_named_with_a_colon(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_rewards.py").write_text("def always(completions): return [1.0] * len(completions)")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert scores(Func("my_rewards:always")) == [1, 1]


def test_an_exception_names_line_and_sample(tmp_path: Path) -> None:
    body = "def reward_func(completions):\n  return [1 / (len(c) - 9) for c in completions]"
    with pytest.raises(UsageError) as caught:
        func(tmp_path, body)(TWO)
    message = str(caught.value)
    assert "line 2: ZeroDivisionError: division by zero, on sample 1, prompt 'p1 ', completion 'two words'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py", "there is no such file"),
        ("nowhere", "expected a .py file or module:name"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("math:no_such_function", "there is no function 'no_such_function'"),
    ],
)
def test_a_function_that_is_not_there_is_a_usage_error(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Func(path)(TWO)


def test_a_dict_without_rewards_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"returned a dict without 'rewards': reward, on sample 0"):
        func(tmp_path, "def reward_func(queries, prompts, labels): return {'reward': [1, 2]}")(TWO)


def test_a_used_function_still_travels_to_other_processes(tmp_path: Path) -> None:
    reward = func(tmp_path, "def reward_func(completions): return [0.0] * len(completions)")
    scores(reward)
    assert pickle.loads(pickle.dumps(reward)) == reward


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1.0], r"reward Length \(rlhf-core\) returned rewards_N of shape \(1,\) for 2 completions; expected \(2,\)"),
        ([[1.0], [2.0]], r"rewards_N of shape \(2, 1\)"),
        (1.0, r"rewards_N of shape \(\)"),
        (None, "returned rewards_N that are not numbers"),
        (["a", "b"], "returned rewards_N that are not numbers"),
        ([0.0, math.nan], r"rewards_N = nan for sample 1, prompt 'p1 ', completion 'two words'"),
        (RewardOutput(torch.zeros(2), rewards_NT=torch.zeros(2, 9)), r"rewards_NT of shape \(2, 9\)"),
        (
            RewardOutput(torch.zeros(2), rewards_NT=torch.tensor([[0, 0, 0], [0, math.inf, 0]])),
            "rewards_NT = inf for sample 1",
        ),
        (RewardOutput(torch.zeros(2), scores_N=torch.zeros(3)), r"scores_N of shape \(3,\)"),
        (RewardOutput(torch.zeros(2), metrics={"m": torch.zeros(1)}), r"metric 'm' of shape \(1,\)"),
        (RewardOutput(torch.zeros(2), metrics=[1]), "metrics that are not a mapping"),  # type: ignore[arg-type]
    ],
)
def test_a_reward_that_breaks_the_contract_is_named_with_its_distribution(raw: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        to_reward_output(raw, TWO, Length())


def test_rewards_of_any_number_type_become_float32_without_gradient() -> None:
    raw = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    output = to_reward_output(raw, TWO, None)
    assert output.rewards_N.dtype == torch.float32
    assert not output.rewards_N.requires_grad
    assert to_reward_output([True, False], TWO, None).rewards_N.tolist() == [1, 0]


def test_length_is_zero_at_its_target_and_falls_linearly() -> None:
    assert scores(Length(target=2)) == [0, -0.5]
    assert scores(Length(target=2, unit="words")) == [-0.5, 0]
    assert scores(Length(target=6, unit="characters")) == [-0.5, -0.5]


def test_sentiment_is_vaders_compound_score() -> None:
    # the first two are printed in the package's README; an unknown word has none
    batch = rollouts("VADER is smart, handsome, and funny.", "VADER is VERY SMART, handsome, and FUNNY!!!", "xyzzy")
    assert scores(Sentiment(), batch) == pytest.approx([0.8316, 0.9342, 0.0], abs=1e-4)


def test_sentiment_without_its_package_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    _analyser.cache_clear()
    with pytest.raises(MissingPackage, match=r"pip install 'rlhf-core\[sentiment\]'"):
        Sentiment()(TWO)
    _analyser.cache_clear()


def test_a_reward_file_that_has_changed_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: the file is edited, or the same words mean a file of another folder."""
    from rlhf_core.reward.calls import load_function

    found = []
    for folder, text in (("a", "1"), ("a", "22"), ("b", "3")):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        Path("reward.py").write_text(f"def reward_func():\n    return {text}\n")
        found.append(load_function("reward.py", "reward_func")())
        assert load_function("reward.py", "reward_func") is load_function("reward.py", "reward_func")
    assert found == [1, 22, 3]


@pytest.mark.parametrize(
    ("function", "read"),
    [
        (lambda completions: 0, ["completions"]),
        (lambda completions, labels=None: 0, ["completions", "labels"]),
        (lambda completions, scale=1.0: 0, ["completions"]),
        (lambda completions, **rest: 0, ["queries", "prompts", "completions", "labels"]),
        (lambda q, p, a: 0, ["queries", "prompts", "completions", "labels"]),
        (lambda completions, unknown: 0, ["queries", "prompts", "completions", "labels"]),
        (lambda: 0, ["queries", "prompts", "completions", "labels"]),
        (dict, ["queries", "prompts", "completions", "labels"]),
    ],
)
def test_a_call_takes_the_columns_that_the_function_names(function: Any, read: list[str]) -> None:
    """Workers are sent no others. Where the names do not say what is read, all are taken."""
    assert list(read_columns(function, ["queries", "prompts", "completions", "labels"])) == read
