"""Trial saves before the first step, in the base's dtype, which plain transformers can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import spec
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
)

from rlhf_core.contract.options import Lora, TrainedOptions
from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.export import dry_save
from rlhf_core.models.export.dry_save import check_saving
from rlhf_core.models.export.folder import export
from rlhf_core.models.export.precision import saved_dtype
from rlhf_core.models.loading.byte_tokenizer import EOS, PAD, TOKENS, byte_tokenizer
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS_OF: dict[str, Any] = {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}


def save(folder: Path, dtype: torch.dtype = torch.float32, generation: dict[str, Any] | None = None) -> str:
    """Write a small Llama with a tokenizer, and a generation configuration as it is given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **TOKENS_OF)).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


def role(model: str, name: str = "actor", **options: Any) -> LocalRole:
    return LocalRole(tiny_run("unused", actor=TrainedOptions(model=model, **options)).plan, name)


# ----------------------------------------------------------------------------------------------------------------------
# generation configurations
# ----------------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "greedy with a temperature": (
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [EOS, 7]},
        "sets temperature, top_p without effect; the saved model omits them",
        {"do_sample": False, "temperature": None, "top_p": None, "eos_token_id": [EOS, 7]},
    ),
    "beams of one": (
        {"do_sample": True, "temperature": 0.6, "length_penalty": 2.0, "eos_token_id": EOS},
        "sets length_penalty without effect; the saved model omits them",
        {"do_sample": True, "temperature": 0.6, "length_penalty": None, "eos_token_id": EOS},
    ),
    "padding below 0": (
        {"do_sample": True, "top_k": 3, "eos_token_id": EOS, "pad_token_id": -1},
        "sets pad_token_id without effect; the saved model omits them",
        {"do_sample": True, "top_k": 3, "eos_token_id": EOS, "pad_token_id": None},
    ),
    "a cache that is not used": (
        {"use_cache": False, "cache_implementation": "static", "eos_token_id": EOS, "pad_token_id": PAD},
        "is invalid, so only its special tokens are kept: ",
        {"use_cache": None, "cache_implementation": None, "eos_token_id": EOS, "pad_token_id": PAD},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_generation_config_is_repaired_on_loading(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers reads each and refuses to save it, after the last step."""
    given, line, expected = WRONG[case]
    model = save(tmp_path / "base", generation=given)
    trained = role(model)
    said = capsys.readouterr().err
    assert said.count("generation_config.json") == 1
    assert line in said
    trained.export(str(tmp_path / "model"))
    found = GenerationConfig.from_pretrained(tmp_path / "model")
    assert {key: getattr(found, key) for key in expected} == expected


def test_a_right_generation_config_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [EOS, 7]}
    role(save(tmp_path / "base", generation=given)).export(str(tmp_path / "model"))
    assert "generation_config.json" not in capsys.readouterr().err
    found = GenerationConfig.from_pretrained(tmp_path / "model")
    assert {key: getattr(found, key) for key in given} == given


# ----------------------------------------------------------------------------------------------------------------------
# the dry save
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=2)], ids=["all", "lora"])
@pytest.mark.parametrize("outputs", ["logprobs_NT", "scores_N"])
def test_what_can_be_saved_passes(outputs: str, lora: Lora, tmp_path: Path) -> None:
    model = save(tmp_path)
    made = spec(outputs, model=model, lora=lora)
    check_saving("actor", build_module(made), made.options)


def test_what_cannot_be_written_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    """A configuration whose saving transformers refuses, made after the model was loaded."""
    made = spec("logprobs_NT", model=save(tmp_path))
    module = build_module(made)
    module.model.generation_config.num_return_sequences = 4
    with pytest.raises(UsageError, match="cannot be saved and loaded again: Greedy methods"):
        check_saving("actor", module, made.options)


CHANGES: dict[str, tuple[str, Any, str]] = {
    "template": ("tokenizer", {"chat_template": "{{ messages }}!"}, "its chat template"),
    "end": ("tokenizer", {"eos_token": "<|im_start|>"}, "its tokenizer's special tokens"),
    "vocabulary": ("config", {"vocab_size": 300}, "its configuration's vocab_size"),
    "context": ("config", {"max_position_embeddings": 7}, "its configuration's max_position_embeddings"),
    "ends": ("generation_config", {"eos_token_id": 3}, "its generation configuration's eos_token_id"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_read_back_as_something_else_is_named(case: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Change the written file on its way to the disk, as a library bug would."""
    place, change, fault = CHANGES[case]
    plain = dry_save.write_folder

    def write(module: Any, tokenizer: Any, target: Path, **options: Any) -> None:
        if place == "tokenizer":
            tokenizer = byte_tokenizer()
            for name, value in change.items():
                setattr(tokenizer, name, value)
        plain(module, tokenizer, target, **options)
        if place != "tokenizer":
            path = target / f"{place}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))

    monkeypatch.setattr(dry_save, "write_folder", write)
    made = spec("logprobs_NT", model=save(tmp_path))
    with pytest.raises(UsageError, match=f"changes when it is saved and loaded again: {fault}"):
        check_saving("actor", build_module(made), made.options)


def test_a_score_head_of_another_shape_is_named(tmp_path: Path) -> None:
    made = spec("scores_N", model=save(tmp_path))
    module = build_module(made)
    module.model.config.num_labels = 3
    with pytest.raises(UsageError, match=r"the shape of score\.weight"):
        check_saving("reward", module, made.options)


def test_a_padding_token_that_ends_rows_is_found_by_scoring(tmp_path: Path, monkeypatch: Any) -> None:
    """transformers reads a row's score before its padding, too early where the row ends with that token."""
    made = spec("scores_N", model=save(tmp_path))
    module = build_module(made)
    last = load_tokenizer(made.options.model, made.options)(dry_save.PROBE)["input_ids"][7]
    module.model.config.pad_token_id = last
    with pytest.raises(UsageError, match=r"changes when .*: its scores of a padded batch"):
        check_saving("reward", module, made.options)


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=2)], ids=["all", "lora"])
def test_a_reward_model_without_a_padding_token_scores_batches_in_plain_transformers(
    lora: Lora, tmp_path: Path
) -> None:
    """GPT-2's tokenizer has one special token, its end; transformers refuses batches of a model without padding."""
    tokenizer = byte_tokenizer()
    single: Any = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    model = save(tmp_path / "base")
    single.save_pretrained(model)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    made = spec("scores_N", model=model, lora=lora)
    module = build_module(made)
    check_saving("reward", module, made.options)
    if lora.rank:
        return
    export(module, load_tokenizer(model, made.options), tmp_path / "model", base=model, algorithm="reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    reader = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert reader.pad_token_id == plain.config.pad_token_id != reader.eos_token_id
    texts = ["a<|im_end|>", "much longer than the other<|im_end|>"]
    with torch.no_grad():
        together = plain(**reader(texts, padding=True, return_tensors="pt")).logits
        apart = torch.cat([plain(**reader(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, apart)


# ----------------------------------------------------------------------------------------------------------------------
# the dtype of what is saved
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["base", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_written_in_the_bases_dtype_or_the_one_asked_for(
    base: torch.dtype, wanted: str, tmp_path: Path
) -> None:
    model = save(tmp_path / "base", base)
    made = tiny_run("unused", actor=TrainedOptions(model=model), export_dtype=wanted)
    trained = LocalRole(made.plan, "actor")
    trained.export(str(tmp_path / "model"))
    dtype = base if wanted == "base" else getattr(torch, wanted)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}, "as its configuration says"
    masters = dict(trained.weights())
    assert all(masters[name].dtype == torch.float32 for name in masters)
    found = plain.state_dict()
    assert all(torch.equal(found[name], masters[name].to(dtype)) for name in masters)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    numbers = sum(each.numel() for each in masters.values())
    assert size < numbers * dtype.itemsize * 1.05 + 4000


def test_the_dtype_of_a_checkpoint_whose_configuration_names_none_is_that_of_its_weights(tmp_path: Path) -> None:
    model = save(tmp_path, torch.bfloat16)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    assert saved_dtype("base", model, TrainedOptions()) == torch.bfloat16
    assert saved_dtype("base", "tiny", TrainedOptions()) == torch.float32


def test_weights_beyond_float16_are_saved_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = role(save(tmp_path / "base", torch.float16))
    with torch.no_grad():
        trained.module.model.model.norm.weight[0] = 1e6
    trained.export(str(tmp_path / "model"))
    assert "model.norm.weight has weights outside the range of float16" in capsys.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.dtype == torch.float32
    assert plain.model.norm.weight[0] == 1e6
