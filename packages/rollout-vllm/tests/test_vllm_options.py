"""Options become vLLM's arguments and parameters, and wrong ones end in one line before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Prompts
from rlhf_core.contract.memory import ModelSize, SamplingLoad
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import UsageError
from rlhf_core.forecast.forecast import forecast
from rlhf_core.forecast.options import PlanOptions
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.arguments import engine_arguments, engine_gpus, memory_share
from rlhf_rollout_vllm.description import describe_model
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}


def test_the_engine_takes_half_of_what_is_free_unless_it_is_told_otherwise() -> None:
    assert memory_share(0.0, free=60, total=80) == 0.375
    assert memory_share(0.0, free=80, total=80) == 0.5
    assert memory_share(0.3, free=10, total=80) == 0.3


@pytest.mark.parametrize(
    ("cpu", "sequences", "eager", "cache"), [(True, 256, True, 4 * 2**30), (False, None, False, None)]
)
def test_devices_have_defaults_of_their_own(cpu: bool, sequences: int | None, eager: bool, cache: int | None) -> None:
    built = engine_arguments(VLLM(), "model", "float32", cpu, 0.4)
    assert (built["max_num_seqs"], built["enforce_eager"], built["kv_cache_memory_bytes"]) == (sequences, eager, cache)
    assert built["gpu_memory_utilization"] == 0.4
    assert built["block_size"] is None


def test_options_that_are_given_win() -> None:
    options = VLLM(
        max_num_seqs=3,
        enforce_eager=True,
        kv_cache_gib=0.5,
        quantization="fp8_per_tensor",
        max_model_len=77,
        block_size=64,
    )
    built = engine_arguments(options, "model", "bfloat16", False, 0.4)
    expected = {
        "max_num_seqs": 3,
        "block_size": 64,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**29,
        "quantization": "fp8_per_tensor",
        "max_model_len": 77,
        "dtype": "bfloat16",
    }
    assert {name: built[name] for name in expected} == expected


SIZE = ModelSize(10**9, 0, 10**7, 10**8, 24, 32000, compute_bytes=2, cache_bytes=10**5)
"""A model of a billion parameters in bfloat16."""
GIB = 2**30


@pytest.mark.parametrize(
    ("options", "free", "device", "expected"),
    [
        pytest.param({}, 60 * GIB, 80 * GIB, 30 * GIB, id="half of what is free"),
        pytest.param({"gpu_memory_utilization": 0.25}, 60 * GIB, 80 * GIB, 20 * GIB, id="a share of the device"),
        pytest.param(
            {"kv_cache_gib": 3.0}, 60 * GIB, 80 * GIB, 2 * 10**9 + 3 * GIB, id="weights and a cache of that size"
        ),
        pytest.param({}, GIB, 80 * GIB, 2 * 10**9, id="weights at the least"),
        pytest.param({}, 0, 0, 2 * 10**9 + 4 * GIB, id="on the CPU"),
        pytest.param(
            {"process": "own", "tensor_parallel_size": 2, "kv_cache_gib": 1.0},
            60 * GIB,
            80 * GIB,
            10**9 + GIB,
            id="weights over two GPUs",
        ),
        pytest.param({"process": "own", "transfer": "nccl"}, 60 * GIB, 80 * GIB, 0, id="on GPUs of its own"),
        pytest.param({"server": ("http://127.0.0.1:1",)}, 60 * GIB, 80 * GIB, 0, id="at a server"),
    ],
)
def test_the_memory_of_an_engine_is_its_weights_and_the_cache_that_vllm_reserves(
    options: dict[str, Any], free: int, device: int, expected: int
) -> None:
    load = SamplingLoad(8, 4, 100, 100, 0, free, device)
    assert VLLM(**options).memory(SIZE, load) == pytest.approx(expected, abs=1)


def test_the_hub_is_not_asked_about_a_model_that_is_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the hub has no such model")

    role = LocalRole(tiny_run(tmp_path / "run").plan, "actor")
    monkeypatch.setattr("transformers.GenerationConfig.from_pretrained", ask)
    assert describe_model(role.spec.options, str(tmp_path / "model")) == str(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"


def test_a_plan_counts_the_engine_on_the_device_of_the_role(tmp_path: Path) -> None:
    plan = forecast(tiny_run(tmp_path, rollout=VLLM(kv_cache_gib=2.0)).config, PlanOptions(gpu_gib=16))
    actor = plan.roles["actor"]
    assert actor.memory.cache == actor.size.parameters * actor.size.compute_bytes + 2 * GIB
    sampling = next(phase for phase in plan.phases if phase.name == "sample actor")
    assert sampling.bytes >= 2 * GIB + sum(role.memory.resident for role in plan.roles.values())


def test_processes_that_do_not_divide_the_heads_are_refused_before_anything_starts(tmp_path: Path) -> None:
    four = VLLM(process="own", tensor_parallel_size=4)
    with pytest.raises(UsageError) as caught:
        four.check_plan(tiny_run(tmp_path, model="tiny:heads=6,hidden=192", rollout=four).plan)
    assert str(caught.value) == (
        "tensor_parallel_size 4 does not divide the 6 attention heads of tiny:heads=6,hidden=192, the model of role actor; "
        "choose a number that does"
    )
    four.check_plan(tiny_run(tmp_path, model="tiny:heads=8,hidden=256", rollout=four).plan)


@pytest.mark.parametrize(("size", "allowed"), [(2, False), (3, True), (4, False), (6, True), (12, True)])
def test_key_value_heads_are_dealt_or_repeated(size: int, allowed: bool, tmp_path: Path) -> None:
    """vLLM's own rule (its `QKVParallelLinear`), for 12 heads of queries and 3 of keys and values."""
    model = "tiny:heads=12,kv_heads=3,hidden=384"
    engine = VLLM(process="own", tensor_parallel_size=size)
    plan = tiny_run(tmp_path, model=model, rollout=engine).plan
    if allowed:
        engine.check_plan(plan)
        return
    with pytest.raises(UsageError) as caught:
        engine.check_plan(plan)
    assert str(caught.value) == (
        f"tensor_parallel_size {size} neither divides the 3 key-value heads of {model}, the model of role actor, "
        "nor is a multiple of them; choose a number that does"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {"x": 1.0}}, "logit_bias needs token ids with biases from -100 to 100, not 1.0 for x"),
        ({"logit_bias": {"3": 101.0}}, "logit_bias needs token ids with biases from -100 to 100, not 101.0 for 3"),
        ({"logit_bias": {"3": float("nan")}}, "logit_bias needs token ids with biases from -100 to 100"),
        ({"guided_regex": "("}, "guided_regex is not a regular expression"),
        ({"guided_json": "{"}, "guided_json is neither a JSON schema nor a file that contains one"),
        ({"guided_json": "nowhere.json"}, "guided_json is neither a JSON schema nor a file that contains one"),
        ({"guided_regex": "a", "guided_choice": ("a",)}, "guided_regex cannot be combined with guided_choice"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be at least 0 and at most 1, not 1.1"),
        (
            {"tensor_parallel_size": 2},
            "tensor_parallel_size works only with engines in separate processes; pass process = ",
        ),
        ({"process": "own", "data_parallel_size": 0}, "data_parallel_size must be at least 1, not 0"),
        ({"transfer": "ipc"}, "transfer works only with engines in separate processes; pass process ="),
        (
            {"process": "own", "transfer": "ipc", "tensor_parallel_size": 2},
            "transfer ipc works only on the trainer's GPU",
        ),
        ({"restarts": -1}, "restarts must be at least 0, not -1"),
        ({"answer_seconds": 0.0}, "answer_seconds must be above 0, not 0.0"),
        ({"max_num_seqs": -1}, "max_num_seqs must be at least 0, not -1"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        VLLM(**options)


def test_a_schema_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert VLLM(guided_json=str(path)).json_schema() == VLLM(guided_json=json.dumps(SCHEMA)).json_schema() == SCHEMA


@pytest.mark.parametrize(
    ("options", "ranks", "rank", "expected"),
    [
        ({}, 1, 0, None),
        ({"tensor_parallel_size": 4}, 1, 0, None),
        ({}, 8, 5, [5]),
        ({"transfer": "nccl"}, 1, 0, [1]),
        ({"transfer": "nccl", "tensor_parallel_size": 2}, 4, 1, [6, 7]),
    ],
)
def test_engines_of_ranks_have_gpus_of_their_own(
    options: dict[str, Any], ranks: int, rank: int, expected: list[int] | None
) -> None:
    environment = {"LOCAL_WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    assert engine_gpus(VLLM(process="own", **options), environment) == expected


def test_ranks_with_an_engine_on_several_gpus_each_are_refused() -> None:
    with pytest.raises(
        UsageError, match="tensor_parallel_size need a single engine, but each of the 2 ranks has one on its GPU"
    ):
        engine_gpus(VLLM(process="own", tensor_parallel_size=2), {"LOCAL_WORLD_SIZE": "2"})


def test_a_launcher_is_told_how_many_gpus_an_engine_has() -> None:
    assert VLLM().devices == 1
    assert VLLM(process="own", tensor_parallel_size=4, pipeline_parallel_size=2, data_parallel_size=3).devices == 24


@pytest.mark.vllm
def test_weights_that_the_trainer_lost_cannot_be_sent_again(tmp_path: Path) -> None:
    """Ahead of training, only shared memory still has the weights that an engine had when it died."""
    options = {"process": "own", "transfer": "ipc"}
    with pytest.raises(UsageError, match="restarts.* with .*ahead.* needs weights that the trainer no longer has"):
        tiny_run(tmp_path, rollout=VLLM(**options), ahead=1).train()


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ways_of_weights_between_gpus_need_some(role: LocalRole, prompts: Prompts) -> None:
    engines = VLLMEngines(VLLM(process="own", transfer="nccl"))
    with pytest.raises(UsageError, match="transfer nccl needs a GPU, but there is none; leave it out"):
        engines(role, prompts, Sampling(n=1, max_new_tokens=1))


@pytest.fixture
def shaped(engine: VLLMEngines, role: LocalRole, prompts: Prompts) -> Iterator[Any]:
    """`shaped(sampling, **options)`: texts and ids of what the open engine samples under other options."""
    engine(role, prompts, Sampling(n=1, max_new_tokens=1))
    session = engine.engines["actor"]
    before = session.parameters

    def sample(sampling: Sampling, **options: Any) -> Any:
        from dataclasses import replace

        session.parameters = replace(before, options=VLLM(**options))
        return engine(role, prompts, sampling)

    yield sample
    session.parameters = before


@pytest.mark.vllm
def test_completions_have_the_shape_that_is_asked_for(shaped: Any) -> None:
    sampling = Sampling(n=2, max_new_tokens=40, temperature=0.7)
    for text, how in zip(*_rows(shaped(sampling, guided_regex="[ab]{2,4}")), strict=True):
        assert how == "stop"
        assert re.fullmatch("[ab]{2,4}", text)
    for text, how in zip(*_rows(shaped(sampling, guided_choice=("yes", "no"))), strict=True):
        assert how == "stop"
        assert text in ("yes", "no")
    texts, finish = _rows(shaped(sampling, guided_json=json.dumps(SCHEMA)))
    complete = [json.loads(text) for text, how in zip(texts, finish, strict=True) if how == "stop"]
    assert complete
    assert all(isinstance(each["a"], int) for each in complete)


@pytest.mark.vllm
def test_a_biased_token_is_drawn_always_or_never(shaped: Any) -> None:
    sampling = Sampling(n=4, max_new_tokens=8, temperature=0.7)
    assert set(shaped(sampling, logit_bias={"65": 100.0}).tokens_NT.flatten().tolist()) == {65}
    drawn = shaped(sampling)
    often = int(drawn.tokens_NT[drawn.mask_NT].mode().values)
    without = shaped(sampling, logit_bias={str(often): -100.0})
    assert often not in without.tokens_NT[without.mask_NT].tolist()
    with pytest.raises(UsageError, match="logit_bias names the token 99999, but the model has"):
        shaped(sampling, logit_bias={"99999": 1.0})


@pytest.mark.vllm
def test_engines_with_other_seeds_sample_other_completions(shaped: Any) -> None:
    sampling = Sampling(n=4, max_new_tokens=8, temperature=0.7)
    first, second = shaped(sampling, seed=1), shaped(sampling, seed=2)
    assert first.tokens_NT.tolist() == shaped(sampling, seed=1).tokens_NT.tolist()
    assert first.tokens_NT.tolist() != second.tokens_NT.tolist()
    assert shaped(sampling, seed=0).tokens_NT.tolist() == shaped(sampling).tokens_NT.tolist()


def _rows(rollouts: Any) -> tuple[list[str], list[str]]:
    return rollouts.texts, rollouts.finish
