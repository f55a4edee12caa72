"""New tokens and adapters on deferred models: each weight is changed when it is read, into what a whole load gives."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
)

from rlhf_core.contract.options import Lora, ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.contract.terms import Term
from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.loading.byte_tokenizer import TOKENS, byte_tokenizer
from rlhf_core.models.loading.deferral import _reads, compute_deferred, defer_weights, is_deferred, read_weight
from rlhf_core.models.loading.load import load_model, load_scorer

SIZES: dict[str, Any] = {
    "vocab_size": TOKENS + 3,  # two new tokens fit, as into a head that is padded to a round size
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "transposed": GPT2Config(
        vocab_size=TOKENS + 3, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    ),
    "scaled": Gemma2Config(**SIZES, head_dim=8),
    "biased": PhiConfig(**{**SIZES, "num_key_value_heads": 2}),
    "fused": MixtralConfig(**SIZES, num_local_experts=2),
}
"""Architectures; `transposed` and `scaled` are tied, `biased` has a head with a bias, `fused` stacked experts."""

NEW = {"none": ("a",), "fit": ("<think>", "</think>"), "more": tuple(f"<{k}>" for k in range(5))}
"""Tokens to add: all are known, they fit into the padding of the head, or it grows."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved model of each architecture in several files, with a tokenizer."""
    made = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder, max_shard_size="20KB")
        byte_tokenizer(TOKENS).save_pretrained(folder)
        made[name] = str(folder)
    return made


needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")


def compare(load: Callable[[], Any], most: int = 0) -> tuple[Any, Any]:
    """Load a model plainly and deferred; compare memory, computation, numbers, dtypes, ties and configurations.

    Args:
        load: loads it.
        most: the number of numbers that a deferred model may hold.
    """
    plain = load()
    with defer_weights():
        deferred = load()
    whole = sum(parameter.numel() for parameter in deferred.parameters() if not is_deferred(parameter))
    assert whole <= most
    ids = torch.tensor([[5, 6, 7]])
    with compute_deferred(deferred):
        assert torch.equal(deferred(input_ids=ids).logits, plain(input_ids=ids).logits)
    for parameter in deferred.parameters():
        read_weight(parameter)
    ours, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (deferred, plain))
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype and parameter.shape == theirs[name].shape, name
        assert torch.equal(parameter, theirs[name]), name
        assert parameter.requires_grad == theirs[name].requires_grad, name
    assert len({*map(id, ours.values())}) == len({*map(id, theirs.values())}), "tied weights stay tied"
    found, expected = (model.config.to_dict() for model in (deferred, plain))
    assert found == expected
    return deferred, plain


def peak(action: Callable[[], object]) -> int:
    """Return the most bytes of tensors in main memory at any time of `action`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    changes = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(each.nbytes() for each in sorted(changes, key=lambda each: each.start_ns())))


@pytest.mark.parametrize("change", ["tokens", pytest.param("adapter", marks=needs_peft)])
def test_loading_and_reading_one_weight_at_a_time_holds_a_few_at_most(change: str, tmp_path: Path) -> None:
    """Every weight is dropped after it is read, as if a rank's share were nothing."""
    model, extra = "tiny:hidden=128,layers=16", 0  # of no files: they are mapped, which the profiler takes for memory
    (tmp_path / "tokens.txt").write_text("\n".join(NEW["more"]))
    options = ModelOptions(add_tokens=str(tmp_path / "tokens.txt"))
    if change == "adapter":
        load_model(model, ModelOptions()).save_pretrained(tmp_path / "base")
        file = Path(save_adapter(str(tmp_path / "base"), tmp_path / "adapter")) / "adapter_model.safetensors"
        config = file.with_name("adapter_config.json")
        config.write_text(config.read_text().replace(str(tmp_path / "base"), model))
        model, extra = str(file.parent), 2 * file.stat().st_size  # the factors of PEFT, and the file that it reads

    def load() -> None:
        with defer_weights():
            deferred = load_model(model, options)
        for parameter in deferred.parameters():
            read_weight(parameter)
            parameter.data = torch.empty(0)

    sizes = [4 * parameter.numel() for parameter in load_model(model, options).parameters()]
    assert peak(lambda: load_model(model, options)) >= sum(sizes)
    assert peak(load) <= 5 * max(sizes) + extra < sum(sizes) / 3


# --- new tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("name", [*CONFIGS, "tiny"])
def test_new_tokens_become_those_of_a_whole_load(
    name: str, new: str, trained: bool, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokens.txt").write_text("\n".join(NEW[new]))
    options = ModelOptions(dtype="bfloat16", add_tokens=str(tmp_path / "tokens.txt"))
    with caplog.at_level(logging.INFO):
        deferred, _ = compare(lambda: load_model(folders.get(name, name), options, trained=trained))
    assert "whole weights" not in caplog.text
    added = 0 if new == "none" else len(NEW[new])
    assert deferred.new_tokens == added
    base = load_model(folders.get(name, name), ModelOptions(dtype="bfloat16"), trained=trained)
    rows, old = (model.get_input_embeddings().weight.detach() for model in (deferred, base))
    assert torch.equal(rows[:TOKENS], old[:TOKENS])
    assert len(rows) == max(TOKENS + added, len(old))
    expected = old[:TOKENS].double().mean(0).expand(added, -1)
    tolerance = 1e-7 if trained else 2e-3  # the mean is rounded to bfloat16
    torch.testing.assert_close(rows[TOKENS : TOKENS + added].double(), expected, rtol=tolerance, atol=tolerance)


def test_a_scorer_with_new_tokens_is_deferred_but_for_its_head(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("\n".join(NEW["more"]))
    options = ModelOptions(add_tokens=str(tmp_path / "tokens.txt"))
    model = AutoModelForSequenceClassification.from_pretrained(folders["untied"], num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "scorer")
    byte_tokenizer(TOKENS).save_pretrained(tmp_path / "scorer")
    deferred, _ = compare(lambda: load_scorer(str(tmp_path / "scorer"), options)[0], most=16)
    assert deferred.get_input_embeddings().weight.shape[0] == TOKENS + 5


def test_tokens_that_a_run_added_before_are_known_when_it_resumes(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("\n".join(NEW["more"]))
    options = ModelOptions(add_tokens=str(tmp_path / "tokens.txt"))
    grown = load_model(folders["tied"], options)
    with torch.no_grad():
        grown.get_input_embeddings().weight[TOKENS:] += 1  # as training does
    grown.save_pretrained(tmp_path / "out")
    tokenizer = byte_tokenizer(TOKENS)
    tokenizer.add_tokens([*NEW["more"]])
    tokenizer.save_pretrained(tmp_path / "out")
    again, _ = compare(lambda: load_model(str(tmp_path / "out"), options))
    assert again.new_tokens == 0
    assert torch.equal(again.get_input_embeddings().weight, grown.get_input_embeddings().weight)


# --- adapters ---------------------------------------------------------------------------------------------------------

LINEAR = {
    "transposed": ["c_attn", "c_proj", "c_fc"],
    "biased": ["q_proj", "dense", "fc1"],
    "fused": ["q_proj", "o_proj"],
}


def save_adapter(base: str, folder: Path, scorer: bool = False, **settings: Any) -> str:
    """Save an adapter with numbers that change the model."""
    import peft

    auto: Any = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    model = auto.from_pretrained(base, **({"num_labels": 1} if scorer else {}))
    kind = settings.pop("kind", "LoraConfig")
    usual = {"target_modules": "all-linear"} | ({"r": 4} if kind == "LoraConfig" else {})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises against some settings that it supports
        torch.manual_seed(2)
        adapted = peft.get_peft_model(model, getattr(peft, kind)(**(usual | settings)))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or name.endswith("base_layer.bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(str(folder))
    return str(folder)


@needs_peft
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_merged_as_in_a_whole_load(
    name: str, trained: bool, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    targets = LINEAR.get(name, "all-linear")
    saved = save_adapter(folders[name], tmp_path, target_modules=targets, fan_in_fan_out=name == "transposed")
    with caplog.at_level(logging.INFO):
        deferred, _ = compare(lambda: load_model(saved, ModelOptions(dtype="bfloat16"), trained=trained))
    assert "whole weights" not in caplog.text
    base = load_model(folders[name], ModelOptions(dtype="bfloat16"), trained=trained)
    assert any(not torch.equal(*pair) for pair in zip(deferred.parameters(), base.parameters(), strict=True))


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings": ("untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embeddings": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole head": ("untied", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "biases": ("biased", {"bias": "all", "target_modules": ["q_proj", "dense"]}),
    "bias of B": ("biased", {"lora_bias": True, "target_modules": ["q_proj", "dense"]}),
    "dora": ("untied", {"use_dora": True, "use_rslora": True}),
    "tokens": ("untied", {"trainable_token_indices": [3, 7]}),
    "tokens, tied": ("tied", {"trainable_token_indices": [3, 7]}),
    "experts": ("fused", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "tied adapters": ("tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "patterns": ("untied", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], **PATTERNS}),
}


@needs_peft
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and:UserWarning")  # PEFT's, of both loads
@pytest.mark.parametrize("kind", KINDS)
def test_variants_of_lora_are_merged_as_in_a_whole_load(
    kind: str, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, settings = KINDS[kind]
    saved = save_adapter(folders[base], tmp_path, **settings)
    with caplog.at_level(logging.INFO):
        compare(lambda: load_model(saved, ModelOptions()))
    assert "whole weights" not in caplog.text


WHOLE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "other kind": {"kind": "LoHaConfig", "target_modules": ["q_proj", "v_proj"]},
}


@needs_peft
@pytest.mark.parametrize("kind", WHOLE)
def test_adapters_that_look_at_weights_are_read_whole_and_that_is_logged(
    kind: str, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_adapter(folders["untied"], tmp_path, **WHOLE[kind])
    with caplog.at_level(logging.INFO):
        compare(lambda: load_model(saved, ModelOptions()), most=10**9)
    assert "every rank loads whole weights before it keeps its share" in caplog.text
    assert "is an adapter of a kind that is computed from them" in caplog.text


@needs_peft
@pytest.mark.parametrize("saves", [None, ["score"], ["score", "embed_tokens"]])
def test_an_adapter_of_a_reward_model_is_deferred_but_for_its_head(
    saves: list[str] | None, folders: dict[str, str], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders["untied"], num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "base")
    saved = save_adapter(
        str(tmp_path / "base"), tmp_path / "adapter", scorer=True, target_modules=["q_proj"], modules_to_save=saves
    )
    deferred, _ = compare(lambda: load_scorer(saved, ModelOptions())[0], most=16)
    assert (deferred.score.weight == model.score.weight).all() == (saves is None)


@needs_peft
@pytest.mark.parametrize("name", ["tied", "untied", "transposed", "scaled"])
def test_adapters_upon_adapters_with_new_tokens(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("\n".join(NEW["more"]))
    options = ModelOptions(add_tokens=str(tmp_path / "tokens.txt"))
    targets = LINEAR.get(name, ["q_proj", "up_proj"])
    first = save_adapter(folders[name], tmp_path / "first", target_modules=targets, fan_in_fan_out=name == "transposed")
    load_model(first, ModelOptions()).save_pretrained(tmp_path / "merged")
    second = save_adapter(
        str(tmp_path / "merged"), tmp_path / "second", target_modules=targets, fan_in_fan_out=name == "transposed"
    )
    config = (tmp_path / "second" / "adapter_config.json").read_text()
    (tmp_path / "second" / "adapter_config.json").write_text(config.replace(str(tmp_path / "merged"), first))
    deferred, _ = compare(lambda: load_model(second, options))
    assert deferred.get_input_embeddings().weight.shape[0] == TOKENS + 5 and deferred.new_tokens == 5


@needs_peft
def test_an_adapter_that_does_not_fit_is_told_in_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(save_adapter(folders["untied"], tmp_path)) / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, file)
    with defer_weights(), pytest.raises(UsageError, match="does not fit its base"):
        load_model(str(tmp_path), ModelOptions())
    save_file(weights | {name: weights[name] * float("nan")}, file)
    with defer_weights():
        model = load_model(str(tmp_path), ModelOptions())
    with pytest.raises(UsageError, match="does not fit its base: NaNs detected"):
        for parameter in model.parameters():
            read_weight(parameter)


@needs_peft
def test_a_deferred_model_that_is_dropped_takes_its_adapter_along(folders: dict[str, str], tmp_path: Path) -> None:
    saved = save_adapter(folders["fused"], tmp_path, **KINDS["experts"][1])
    gc.collect()
    before = len(_reads())
    with defer_weights():
        model = load_model(saved, ModelOptions())
    assert len(_reads()) > before
    del model
    gc.collect()
    assert len(_reads()) == before


@needs_peft
def test_new_adapters_upon_a_merged_one_are_those_of_a_whole_load(folders: dict[str, str], tmp_path: Path) -> None:
    saved = save_adapter(folders["untied"], tmp_path)
    terms: Any = (("data", Term("actor", "data", None)),)  # type: ignore[arg-type]  # nothing is computed
    options = TrainedOptions(model=saved, lora=Lora(rank=2))
    spec = RoleSpec("actor", options, frozenset({"logprobs_NT"}), terms=terms)
    plain = build_module(spec)
    with defer_weights():
        deferred = build_module(spec)
    for parameter in deferred.parameters():
        assert is_deferred(parameter) or parameter.requires_grad, "only the new factors have numbers"
        read_weight(parameter)
    assert len(list(deferred.parameters())) == len(list(plain.parameters()))
    assert all(torch.equal(*pair) for pair in zip(deferred.parameters(), plain.parameters(), strict=True))
