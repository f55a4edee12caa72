"""Mixtures of experts are planned: memory against the allocator, operations against closed forms, routing against counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from rlhf_core import make_config
from rlhf_core.contract.options import ModelOptions
from rlhf_core.forecast.forecast import Forecast, forecast
from rlhf_core.forecast.options import PlanOptions
from rlhf_core.forecast.routing import Routing
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.testing import compare_memory

pytest.importorskip("rlhf_algos")

H, V, LAYERS, KV = 128, 2000, 3, 64
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": KV // 2,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=384, num_local_experts=4, num_experts_per_tok=2),
    "qwen3": Qwen3MoeConfig(**SIZES, moe_intermediate_size=96, num_experts=16, num_experts_per_tok=4),
}
EXPERT = {"mixtral": 3 * H * 384, "qwen3": 3 * H * 96}
"""Numbers of an expert: gate, up and down."""
EXPERTS, CHOSEN = {"mixtral": 4, "qwen3": 16}, {"mixtral": 2, "qwen3": 4}


def save(folder: Path, name: str, implementation: str = "grouped_mm") -> str:
    """Write a model without numbers that mean anything, with the tokenizer of `tiny`."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
    load_tokenizer(f"tiny:vocab={V}", ModelOptions()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "experts_implementation": implementation}))
    return str(folder)


def planned(model: str, **options: Any) -> Forecast:
    config = make_config(
        "sft",
        model=model,
        data=[{"prompt": "a", "completion": "b"}] * 8,
        batch_size=8,
        steps=2,
        output="unused",
        **options,
    )
    lengths = PlanOptions(prompt_tokens=16, completion_tokens=16, tflops=1.0, gb_s=1e9, gpu_gib=1)
    return forecast(config, lengths)


RECOMPUTED = {"dtype": "bfloat16", "actor": {"gradient_checkpointing": True}}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "implementation", "options"),
    [
        ("mixtral", "grouped_mm", {}),
        ("qwen3", "eager", RECOMPUTED),
        pytest.param("mixtral", "grouped_mm", RECOMPUTED, marks=SLOW),
        pytest.param("mixtral", "eager", {}, marks=SLOW),
        pytest.param("mixtral", "batched_mm", {}, marks=SLOW),
        pytest.param("qwen3", "grouped_mm", {}, marks=SLOW),
        pytest.param("qwen3", "grouped_mm", {"actor": {"lora": {"rank": 4}}}, marks=SLOW),
        pytest.param("qwen3", "grouped_mm", {"actor": {"router_aux_coef": 0.01}}, marks=SLOW),
    ],
)
def test_the_forecast_is_within_a_tenth_of_what_the_allocator_counts(
    name: str, implementation: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if "lora" in options.get("actor", {}):
        pytest.importorskip("peft")
    model = save(tmp_path / "model", name, implementation)
    found, measured = compare_memory("sft", tmp_path, model=model, rows=6, prompt=60, completion=60, **options)
    # Weights are views of their mapped file, which the allocator counts whole; experts are merged into new tensors.
    measured -= 4 * LAYERS * EXPERTS[name] * EXPERT[name]
    assert found == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_experts_are_held_and_the_chosen_ones_are_computed(name: str, implementation: str, tmp_path: Path) -> None:
    found = planned(save(tmp_path, name, implementation))
    attention = 2 * H * H + 2 * H * KV
    norms = 2 * H + (KV if name == "qwen3" else 0)  # those of queries and keys, too
    layer = attention + EXPERTS[name] * H + EXPERTS[name] * EXPERT[name] + norms
    assert found.roles["actor"].size.parameters == 2 * V * H + LAYERS * layer + H
    body = LAYERS * (attention + EXPERTS[name] * H + CHOSEN[name] * EXPERT[name])
    tokens, completion = 8 * 32, 8 * 16
    forward = tokens * (2 * body + 2 * LAYERS * H * 32) + completion * 2 * V * H
    (phase,) = found.phases
    assert phase.seconds == pytest.approx(3 * forward / 1e12, rel=1e-3)


def test_a_graph_grows_with_the_chosen_experts_and_not_with_all(tmp_path: Path) -> None:
    """A chosen expert keeps its input, gate and up together, their product's two parts, and its output, per token."""
    graphs = []
    for chosen in (2, 4):
        CONFIGS["mixtral"].num_experts_per_tok = chosen
        graphs.append(planned(save(tmp_path / str(chosen), "mixtral")).roles["actor"].graph)
    CONFIGS["mixtral"].num_experts_per_tok = 2
    tokens, kept = 8 * 32, 2 * H + 4 * 384
    assert graphs[1] - graphs[0] == pytest.approx(2 * 4 * tokens * LAYERS * kept, rel=0.1)


def test_choices_are_balanced_and_what_follows_from_them_has_numbers() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Routing() as routing:
        scores_NE = torch.randn(7, 4)
        chosen_NK = scores_NE.topk(2).indices
        assert torch.nn.functional.one_hot(chosen_NK, 4).sum((0, 1)).tolist() == [4, 4, 3, 3]
        assert chosen_NK.reshape(-1).bincount(minlength=4).shape == (4,)
        mask_NE = torch.zeros_like(scores_NE).scatter_(1, chosen_NK, 1.0)
        assert [len(scores_NE[torch.where(mask_NE[:, expert])]) for expert in range(4)] == [4, 4, 3, 3]
        assert scores_NE.argmax(-1).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert routing.chosen == {4: 2}


def test_numbers_that_follow_from_weights_stay_unknown() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Routing():
        weights, known = torch.randn(7, 4), torch.zeros(7, 4)
        assert float(known.sum()) == 0
        known.add_(weights)
        for unknown in (weights, known, weights * torch.zeros(7, 4), weights.topk(2).values):
            with pytest.raises(DataDependentOutputException):
                unknown.sum().item()
