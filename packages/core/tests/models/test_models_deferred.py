"""Deferred weights: a model without numbers computes, and gets the numbers of a plain one when they are read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FalconMambaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3VLMoeConfig,
)

from rlhf_core.contract.options import Lora, ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.terms import Term
from rlhf_core.models.build import build_module
from rlhf_core.models.loading.deferral import compute_deferred, defer_weights, read_weight, read_whole
from rlhf_core.models.loading.load import load_model, load_scorer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, Any] = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": MistralConfig(**SIZES, tie_word_embeddings=False),
    "transposed": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "fused": MixtralConfig(**SIZES, num_local_experts=2),
    "outside": FalconMambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
}
"""Architectures; `fused` has experts that transformers puts together, `outside` a layer that reads another one's weight."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved bfloat16 model of each architecture, in several files."""
    made = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
                folder, max_shard_size="20KB"
            )
        made[name] = str(folder)
    return made


def held(model: torch.nn.Module) -> int:
    """Return the bytes of the memory of all parameters."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
    return sum(storages.values())


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Compare all names, numbers, dtypes and ties."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["tiny", "tiny:layers=1,seed=3", "tied", "untied", "transposed", "fused", "outside"])
def test_deferred_weights_become_those_of_a_plain_model(name: str, trained: bool, folders: dict[str, str]) -> None:
    options = ModelOptions(dtype="bfloat16")
    plain = load_model(folders.get(name, name), options, trained=trained)
    with defer_weights():
        deferred = load_model(folders.get(name, name), options, trained=trained)
    assert held(deferred) < held(plain) / 50
    for parameter in deferred.parameters():
        read_weight(parameter)
    assert held(deferred) == held(plain)
    assert_same(deferred, plain)


def test_a_conversion_that_looks_at_the_shape_of_its_parameter_is_deferred(tmp_path: Path) -> None:
    """Qwen3-VL's experts are stored transposed or not, and transformers compares shapes."""
    text = {**SIZES, "moe_intermediate_size": 24, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    seeing = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    seeing |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4}
    tokens = {f"{name}_token_id": 290 + k for k, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    config = Qwen3VLMoeConfig(text_config={**text, "rope_parameters": rope}, vision_config=seeing, **tokens)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    plain = load_model(str(tmp_path), ModelOptions())
    with defer_weights():
        deferred = load_model(str(tmp_path), ModelOptions())
    assert held(deferred) < held(plain) / 50
    read_whole(deferred, "")
    assert_same(deferred, plain)


@pytest.mark.parametrize("same", [True, False])
def test_weights_that_a_file_has_twice_are_tied_if_they_are_equal(same: bool, tmp_path: Path) -> None:
    """Some checkpoints have a head of their own under a configuration that ties it; transformers goes by the numbers."""
    model: Any = AutoModelForCausalLM.from_config(CONFIGS["untied"])
    if same:
        model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    plain = load_model(str(tmp_path), ModelOptions())
    with defer_weights():
        deferred = load_model(str(tmp_path), ModelOptions())
    assert held(deferred) < held(plain) / 50
    read_whole(deferred, "")
    assert_same(deferred, plain)
    for each in (plain, deferred):
        assert (each.get_output_embeddings().weight is each.get_input_embeddings().weight) == same


@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_a_scorer_is_deferred_but_for_its_head(name: str, folders: dict[str, str]) -> None:
    with defer_weights():
        model, found = load_scorer(folders.get(name, name), ModelOptions())
    assert not found
    assert model.score.weight.untyped_storage().nbytes() == 4 * model.score.weight.numel()
    read_whole(model, "")
    torch.manual_seed(0)
    assert_same(model.model, load_scorer(folders.get(name, name), ModelOptions())[0].model)


def test_a_deferred_model_computes_and_forgets(folders: dict[str, str]) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for name in ("tied", "untied"):
        expected = load_model(folders[name], ModelOptions())(input_ids=ids).logits
        with defer_weights():
            model = load_model(folders[name], ModelOptions())
        before = held(model)
        with compute_deferred(model) as deferred:
            assert deferred
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert held(model) == before
        assert not model(input_ids=ids).logits.any()  # no numbers outside


def spec(model: str, trained: bool, **options: Any) -> RoleSpec:
    """The spec of a role with a language-model head and a value head."""
    outputs = frozenset({"logprobs_NT", "values_NT"})
    if not trained:
        return RoleSpec("actor", ModelOptions(model=model), outputs)
    terms: Any = (("data", Term("actor", "data", None)),)  # type: ignore[arg-type]  # nothing is computed
    return RoleSpec("actor", TrainedOptions(model=model, **options), outputs, terms=terms)


ROLES: dict[str, dict[str, Any]] = {"plain": {}, "averaged": {"ema": 0.9}, "frozen": {"freeze": ("embed",)}}
if find_spec("peft"):
    ROLES["lora"] = {"lora": Lora(rank=4)}


@pytest.mark.parametrize("name", ["tiny", "tied", "outside"])
@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_built_and_checked_without_its_weights(name: str, role: str, folders: dict[str, str]) -> None:
    if name == "outside" and role == "lora":
        pytest.skip("its layers are no places of adapters")
    made = spec(folders.get(name, name), True, **ROLES[role])
    plain = build_module(made)
    with defer_weights():
        deferred = build_module(made)
    assert held(deferred.model.base_model) < held(plain.model.base_model) / 2 or name == "outside"
    assert [each.requires_grad for each in deferred.parameters()] == [each.requires_grad for each in plain.parameters()]
    read_whole(deferred, "")
    assert_same(deferred, plain)
