"""Memory of sampling in a forecast: copies of weights, and what stays on the device while roles train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Example, Prompts
from rlhf_core.contract.options import Sampling
from rlhf_core.forecast.forecast import Forecast, forecast
from rlhf_core.forecast.options import PlanOptions
from rlhf_core.rollout.narrow_weights import narrow_weights
from rlhf_core.rollout.slot_sampler import KEEP

pytest.importorskip("rlhf_algos")

MODEL = "tiny:hidden=256,layers=3,heads=4,kv_heads=2,intermediate=768,vocab=2000"
P, L, T, N = 4, 64, 32, 4
GIB = 2**30


def run_of(output: str = "unused", **options: Any) -> Any:
    rows = [{"prompt": "a" * L}] * P
    sampling = {"n": N, "max_new_tokens": T}
    given = {"model": MODEL, "dtype": "bfloat16", "batch_size": P, "steps": 2, "sampling": sampling, **options}
    return make_config("grpo", data=rows, reward="length", output=output, **given)


def planned(gib: float = 0.0, **options: Any) -> Forecast:
    return forecast(run_of(**options), PlanOptions(prompt_tokens=L, completion_tokens=T, gpu_gib=gib))


def test_a_sampler_holds_the_copies_of_weights_that_it_is_planned_with(tmp_path: Path) -> None:
    config = run_of(output=str(tmp_path / "run"))
    found = forecast(config, PlanOptions(prompt_tokens=L, completion_tokens=T)).roles["actor"].memory.cache
    run, copies = Run(config), dict[Any, Any]()
    prompts = Prompts([""] * P, [[3] * L] * P, [Example("")] * P, list(range(P)))
    with run.place():
        with narrow_weights(run.roles["actor"].causal_lm, torch.bfloat16, copies):
            copied = sum(each.nbytes for each in copies.values())
        copies.clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run.rollouts("actor", prompts, Sampling(n=N, max_new_tokens=T))
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    plain = planned(dtype="float32").roles["actor"].memory.cache // 2  # keys, values; nothing is copied in float32
    assert copied > 0.4 * found
    assert found == pytest.approx(peak, rel=0.15)
    assert found - copied == pytest.approx(plain, rel=0.1)


def test_weights_that_are_narrow_already_are_not_copied() -> None:
    pytest.importorskip("peft")
    whole, adapted = (planned(actor={"lora": {"rank": rank}}).roles["actor"] for rank in (0, 4))
    assert whole.memory.cache - adapted.memory.cache == 2 * (whole.size.parameters - 7 * 256 - adapted.size.trained)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_small_buffers_of_graphs_stay_while_roles_train(share: float) -> None:
    """Keys, values and copies of weights that take at most a tenth of the device are kept (`SlotSampler.open_slots`)."""
    size = planned(1.0).roles["actor"].size
    held = P * N * (L + T) * size.cache_bytes + 2 * (size.parameters - 7 * 256)  # norms are no linear layers
    found = planned(held / share / KEEP / GIB)
    alone = found.roles["actor"].memory.kept
    assert alone == (held if share < 1 else 0)
    for phase, roles in zip(found.phases, (("actor",), ("reference",), ("actor",)), strict=True):
        memory = found.roles[roles[0]].memory
        adds = {"sample": memory.cache - memory.kept, "read": memory.inference, "train": memory.training}
        resident = sum(role.memory.resident for role in found.roles.values())
        assert phase.bytes == resident + alone + adds[phase.name.split()[0]]


def test_an_engine_with_weights_of_its_own_stays_while_roles_train() -> None:
    engine = {"use": "fake", "weights_gib": 1.0, "cache_gib": 2.0}
    found, without = planned(rollout=engine), planned(rollout={"use": "fake"})
    assert found.roles["actor"].memory.kept == 3 * GIB
    for phase, before in zip(found.phases, without.phases, strict=True):
        assert phase.bytes - before.bytes == 3 * GIB, phase.name
