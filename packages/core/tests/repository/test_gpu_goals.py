"""Goals of `benchmarks/gpu.py` are judged by figures that a GPU gives. Here figures are stated, and the ratios known."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the checks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"gpu_checks.{name}")


def context_of(checks: Callable[[str], ModuleType], folder: Path, events: list[Any], **limits: float) -> Any:
    return checks("check").Context(True, "cpu", folder, events.append, limits)


def goals_of(events: list[Any]) -> list[tuple[float, float, bool]]:
    return [(e["goal"]["value"], e["goal"]["target"], e["goal"]["at_least"]) for e in events if "goal" in e]


def model_of(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=tied, **SIZES))


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(0.5, True, True), (0.49, True, False), (0.5, False, True), (0.51, False, False)]
)
def test_a_goal_is_met_at_its_target_and_on_its_side(
    checks: Callable[[str], ModuleType], tmp_path: Path, value: float, at_least: bool, met: bool
) -> None:
    events: list[Any] = []
    context = checks("check").Context(False, "cpu", tmp_path, events.append)
    assert context.goal("it", value, 0.5, at_least) is met
    assert events == [
        {"goal": {"what": "it", "value": value, "target": 0.5, "at_least": at_least, "met": met}},
    ]


def test_goals_are_among_what_eight_minutes_reach_first(checks: Callable[[str], ModuleType]) -> None:
    """Each check may take its limit. Those of training, sampling and the head have the goals of the script."""
    first = checks("check").CHECKS[:6]
    assert {"training", "training_compiled", "decoding", "logprobs"} <= {check.name for check in first}
    assert sum(check.seconds for check in first) <= 8 * 60


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_the_weights_it_is_multiplied_with_and_the_cache(
    checks: Callable[[str], ModuleType], tied: bool
) -> None:
    """The cache is transformers' own; of the embedding a token reads a row, unless it is the head, too."""
    model, cache = model_of(tied).bfloat16(), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros(3, 5, dtype=torch.long), past_key_values=cache)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    weights = sum(each.nbytes for name, each in model.named_parameters() if tied or "embed_tokens" not in name)
    assert checks("decoding").token_bytes(model, 15) == weights + held


def test_recomputation_is_one_more_forward_pass_of_the_layers(checks: Callable[[str], ModuleType]) -> None:
    model_flops, model = checks("models").model_flops, model_of(tied=True)
    whole, again = (model_flops(model, [16, 3], recompute) for recompute in (False, True))
    head = 6 * 64 * 32 * 19
    assert again - head == pytest.approx((whole - head) * 4 / 3)


def test_rows_of_mixed_lengths_fill_their_micro_batches(checks: Callable[[str], ModuleType]) -> None:
    lengths = checks("training").mixed_lengths(8192, 4)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert ends[-1] == 4 * 8192 and {8192, 2 * 8192, 3 * 8192} <= set(ends)
    assert min(lengths) >= 4 and len(set(lengths)) > 20


def test_mfu_is_operations_by_seconds_and_the_measured_rate(
    checks: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rlhf_algos")
    training, models, events = checks("training"), checks("models"), list[Any]()
    monkeypatch.setattr(training, "timed", lambda call: 9.0)
    monkeypatch.setattr(training, "peak_gib", lambda call: 0.0)
    monkeypatch.setattr(training, "seconds", lambda call, **_: 2.0)
    monkeypatch.setattr(training, "profile", lambda call: {})
    context = context_of(checks, tmp_path, events, flops=1e9)
    training.measure(context, "1.5B", [training.Case("rows", [64, 64], 64, goal=True)])
    model = models.make_role(context, models.SMALL).causal_lm
    assert goals_of(events) == [(models.model_flops(model, [64, 64]) / (2.0 * 1e9), 0.40, True)]


def test_the_share_of_the_bandwidth_is_ideal_by_measured_time_per_token(
    checks: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollout of 6 tokens takes 7 s, and that of the first one 2: a token takes 1 s."""
    pytest.importorskip("rlhf_algos")
    decoding, events = checks("decoding"), list[Any]()
    monkeypatch.setattr(decoding, "sample_tokens", lambda run, prompts, T: None)
    monkeypatch.setattr(decoding, "timed", lambda call: 2.0 if call.args[2] == 1 else 7.0)
    monkeypatch.setattr(decoding, "profile", lambda call: {})
    monkeypatch.setattr(decoding, "token_bytes", lambda model, cached: cached)
    decoding.decoding(context_of(checks, tmp_path, events, bytes=100.0))
    read = sum(4 * (8 + t) for t in range(1, 6)) / 5  # 4 rows of a prompt of 8, whose tokens 2 to 6 read what is there
    assert goals_of(events) == [(pytest.approx(read / 100), 0.50, True)] * 4


def test_a_head_is_judged_by_what_its_pass_needs_beyond_the_body(
    checks: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rlhf_algos")
    logprobs, events = checks("logprobs"), list[Any]()
    seconds, memory = iter([1.0, 2.0, 2.2]), iter([2.0, 10.0, 3.0])  # body, plain, chunked
    monkeypatch.setattr(logprobs, "seconds", lambda call, **_: next(seconds))
    monkeypatch.setattr(logprobs, "peak_gib", lambda call: next(memory))
    monkeypatch.setattr(logprobs, "profile", lambda call: {})
    logprobs.whole_pass(context_of(checks, tmp_path, events), 512)
    assert goals_of(events) == [(pytest.approx(1.1), 1.05, False), (pytest.approx(1 / 8), 0.25, False)]
