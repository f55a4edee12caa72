"""A step as a whole: how often its parts run, how long they take, and what of a phase is there in another; closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_core import make_config
from rlhf_core.contract.memory import SamplingLoad
from rlhf_core.forecast.forecast import Forecast, forecast
from rlhf_core.forecast.options import PlanOptions
from rlhf_core.rollout.hf import HuggingFaceRollout

pytest.importorskip("rlhf_algos")

H, V, LAYERS, INNER = 64, 259, 2, 192
MODEL = f"tiny:hidden={H},layers={LAYERS},heads=2,kv_heads=1,intermediate={INNER},vocab={V}"
BODY = LAYERS * (2 * H * H + 2 * H * H // 2 + 3 * H * INNER)
"""Numbers of the matrices of all layers: queries and outputs, keys and values of one head, the feed-forward part."""
PARAMETERS = V * H + BODY + LAYERS * 2 * H + H
KEYS = 2 * LAYERS * (H // 2) * 4
"""Bytes of keys and values of a token in float32."""
P, L, T, N = 8, 16, 16, 2


def planned(algorithm: Any = "grpo", plan: dict[str, Any] | None = None, **options: Any) -> Forecast:
    rows = [{"prompt": "a", **({} if "reward" in options else {"completion": "b"})}] * P
    given = {"model": MODEL, "batch_size": P, "steps": 2, "output": "unused", **options}
    if "reward" in options:
        given["sampling"] = {"n": N, "max_new_tokens": T}
    return forecast(
        make_config(algorithm, data=rows, **given), PlanOptions(prompt_tokens=L, completion_tokens=T, **(plan or {}))
    )


def seconds_of(found: Forecast) -> dict[str, float]:
    return {phase.name: phase.seconds or 0.0 for phase in found.phases}


def bytes_of(found: Forecast) -> dict[str, int]:
    return {phase.name: phase.bytes for phase in found.phases}


@pytest.mark.parametrize(("tflops", "gb_s"), [(1e-6, 1e6), (1e6, 1e-6)], ids=["operations limit", "memory limits"])
def test_a_token_takes_its_operations_or_reading_weights_and_cache(tflops: float, gb_s: float) -> None:
    found = seconds_of(planned(reward="length", plan={"tflops": tflops, "gb_s": gb_s}))["sample actor"]
    prefill = P * L * (2 * BODY + 2 * LAYERS * H * L) / (tflops * 1e12)  # each prompt once, for all its completions
    work = 2 * (BODY + V * H) * P * N / (tflops * 1e12)
    read = (4 * PARAMETERS + P * N * (L + T / 2) * KEYS) / (gb_s * 1e9)
    assert found == pytest.approx(prefill + T * max(work, read), rel=1e-3)


def test_epochs_repeat_passes_and_updates_and_minibatches_only_updates() -> None:
    algorithm = {"use": "grpo", "kl": {"coef": 0.0}}
    options: dict[str, Any] = {"reward": "length", "plan": {"tflops": 1e-3, "gb_s": 1.0}}
    once = seconds_of(planned(algorithm, **options))["train actor"]
    epochs, parts = (
        seconds_of(planned(algorithm, **options, **{name: 2}))["train actor"]
        for name in ("update_epochs", "minibatches")
    )
    update = (2 + 1 + 2 * 2) * 4 * PARAMETERS / 1e9
    assert epochs == pytest.approx(2 * once, rel=1e-3)
    assert parts - once == pytest.approx(update, rel=1e-3)


def test_a_minibatch_holds_its_part_of_the_rows() -> None:
    whole, half = (planned(reward="length", minibatches=number).roles["actor"] for number in (1, 2))
    assert (whole.rows, half.rows) == (P * N, P * N // 2)
    assert half.graph == pytest.approx(whole.graph / 2, rel=0.02)


def test_a_graph_is_kept_from_the_pass_that_reads_to_the_one_that_trains() -> None:
    """PPO in one update asks its critic for values before it trains both, so the critic's graph waits for its turn."""
    found = planned("ppo", reward="length", update_epochs=1, minibatches=1)
    roles, phases = found.roles, bytes_of(found)
    resident = sum(role.memory.resident for role in roles.values())
    waiting = roles["critic"].graph
    assert waiting > roles["critic"].memory.inference > 0
    assert {name: size - resident for name, size in phases.items()} == {
        "sample actor": roles["actor"].memory.cache,
        "read reference": waiting + roles["reference"].memory.inference,
        "read critic": waiting,
        "train actor": waiting + roles["actor"].memory.training,
        "train critic": roles["critic"].memory.training,
    }
    again = bytes_of(planned("ppo", reward="length", update_epochs=2, minibatches=1))
    assert again["train actor"] - resident == roles["actor"].memory.training  # computed anew: no graph is kept


def test_four_bits_of_a_weight_are_half_a_byte_and_its_scales() -> None:
    """A scale of 8 bits for 64 weights, and one of 32 bits for 256 scales (Dettmers et al. 2023, section 3)."""
    pytest.importorskip("peft")
    options: dict[str, Any] = {"dtype": "bfloat16", "actor": {"lora": {"rank": 4}}}
    wide = planned("sft", **options).roles["actor"].memory.weights
    options["actor"]["quantize"] = "nf4"
    narrow = planned("sft", **options).roles["actor"].memory.weights
    assert wide - narrow == pytest.approx(BODY * (2 - (4 + 8 / 64 + 32 / (64 * 256)) / 8), rel=1e-3)


def test_a_moving_average_is_one_more_float32_copy() -> None:
    before, found = (planned("sft", actor=each).roles["actor"].memory for each in ({}, {"ema": 0.9}))
    assert found.optimizer - before.optimizer == 4 * PARAMETERS
    assert found.weights == before.weights


def test_buffers_of_graphs_take_half_of_what_is_free_at_most() -> None:
    size = replace(planned(reward="length").roles["actor"].size, compute_bytes=2, vocabulary=0)
    rows, length, free = 64, L + T, 40 * (L + T) * KEYS
    load = SamplingLoad(rows, 1, L, T, prefill=0, free_bytes=free, device_bytes=free)
    by_graphs, plain = (HuggingFaceRollout(graphs=each) for each in ("auto", "off"))
    assert by_graphs.memory(size, load) == free // 2
    assert by_graphs.memory(size, replace(load, free_bytes=10 * free)) == rows * length * KEYS
    assert plain.memory(size, load) == rows * length * KEYS * (1 + 2 / LAYERS)
    assert by_graphs.memory(size, replace(load, gathered=100, narrowed=10)) == free // 2 + 110
