"""Loading models by name, with a one-line error for every wrong name.

Trained models are always float32, the master weights; their strategy computes in the role's dtype by autocast. Frozen
models are loaded in that dtype. Weights are read from safetensors or GGUF only, and code that comes with a model is
not run unless asked for. torch and transformers are imported when something is loaded, not before.

An adapter, in a folder or on the hub, is its base with the adapter merged (`models.loading.adapters`).

For a strategy whose ranks keep shares, the weights stay in their files until it takes them (`models.loading.deferral`).

Left out on purpose: checkpoints that are quantized already, and sharding over devices, which is a strategy's business.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.lazy import torch
from rlhf_core.models.inputs.vision import is_vision
from rlhf_core.models.loading import tiny
from rlhf_core.models.loading.adapters import has_score, merge_adapter, read_base_model
from rlhf_core.models.loading.architecture import choose_attention, name_body, report_attention
from rlhf_core.models.loading.deferral import read_weight
from rlhf_core.models.loading.deferred_files import load_deferred
from rlhf_core.models.loading.foreign import foreign_head
from rlhf_core.models.loading.generation import repair_generation
from rlhf_core.models.loading.hub import find_companion_file, resolve_name
from rlhf_core.models.loading.names import Source
from rlhf_core.models.loading.optional_imports import quiet_bitsandbytes
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.models.loading.transformers_calls import loadable_path, read_config, silence, translate_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from rlhf_core.contract.options import ModelOptions

__all__ = ["fit_embedding", "has_scorer", "load_model", "load_scorer"]

FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
"""Modules that these attention implementations are in, and what pip installs."""


def load_model(name: str, options: ModelOptions, *, trained: bool = False) -> PreTrainedModel:
    """The causal language model called `name`: a hub name, a folder, a GGUF file, `tiny` or `smollm2-135m`. A vision-language
    model with all its parts.

    Raises:
        UsageError: there is no such model, or it cannot be loaded; the message states which.
        MissingPackage: something it needs is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

    source = resolve_name(name)
    _check_attention(options)
    if source.kind == "adapter":
        return merge_adapter(load_model(_base(source, options), options, trained=trained), Path(source.location))
    if source.kind == "tiny":
        _check_tiny(name, options)
        with translate_errors(name):
            made = tiny.parse(name).model(LlamaForCausalLM, _tiny_attention(options), _dtype(options, trained))
        return fit_embedding(name, source, made, options)
    auto = AutoModelForImageTextToText if is_vision(read_config(name, source, options)) else AutoModelForCausalLM
    model, missing = _from_pretrained(auto, name, source, options, trained)
    if missing:
        raise UsageError(
            f"{name} is not a complete language model: {len(missing)} weights are missing, such as {missing[0]}"
        )
    return model


def load_scorer(name: str, options: ModelOptions, *, trained: bool = False) -> tuple[PreTrainedModel, bool]:
    """The model as a sequence classifier with one label, its head called `score`; and whether that head was loaded.

    Where it was not, the head's weights are arbitrary.

    Raises:
        UsageError, MissingPackage: as `load_model`.
    """
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    source = resolve_name(name)
    _check_attention(options)
    if source.kind == "adapter":
        base, found = load_scorer(_base(source, options), options, trained=trained)
        folder = Path(source.location)
        return merge_adapter(base, folder), found or has_score(folder)
    if source.kind == "tiny":
        _check_tiny(name, options)
        size, dtype = tiny.parse(name), _dtype(options, trained)
        with translate_errors(name):
            made: Any = size.model(LlamaForSequenceClassification, _tiny_attention(options), dtype, num_labels=1)
        read_weight(made.score.weight)  # it is drawn again
        return fit_embedding(name, source, made, options), False
    model: Any
    model, missing = _from_pretrained(AutoModelForSequenceClassification, name, source, options, trained, num_labels=1)
    if others := [key for key in missing if key != "score.weight"]:
        raise UsageError(
            f"{name} is not a decoder with a score head: {len(others)} weights are missing, such as {others[0]}"
        )
    for parameter in model.score.parameters():
        read_weight(parameter)  # small, and it may be drawn again
    if missing and (config := find_companion_file(name, "config.json")) and (head := foreign_head(config.parent)):
        model.score = head.to(model.dtype)
        return model, True
    return model, not missing


def has_scorer(name: str, options: ModelOptions) -> bool:
    """Return True if transformers has a sequence classifier for this architecture; about a third have none."""
    from transformers import AutoModelForSequenceClassification

    source = resolve_name(name)
    if source.kind == "tiny":
        return True
    if source.kind == "adapter":
        return has_scorer(_base(source, options), options)
    config = read_config(name, source, options)
    remote = getattr(config, "auto_map", None) or {}
    return type(config) in AutoModelForSequenceClassification._model_mapping or (
        options.trust_remote_code and AutoModelForSequenceClassification.__name__ in remote
    )


# ----------------------------------------------------------------------------------------------------------------------


def _from_pretrained(
    auto: Any, name: str, source: Source, options: ModelOptions, trained: bool, **overrides: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The model and the names of the weights that its checkpoint lacks, sorted."""
    config = read_config(name, source, options, **overrides)
    labels = overrides.get("num_labels")
    if labels and _is_classifier(config) and (found := read_config(name, source, options).num_labels) != labels:
        raise UsageError(f"{name} has {found} classes; choose a reward model with one score")
    load = partial(
        auto.from_pretrained,
        loadable_path(source),
        config=config,
        dtype=_dtype(options, trained),
        attn_implementation=choose_attention(name, config, options),
        trust_remote_code=options.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        **_quantization(options),
    )
    with translate_errors(name), silence(source):
        model, info = load_deferred(name, load, packed=options.quantize != "none")
    report_attention(name, model, options)
    name_body(model)
    repair_generation(name, model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a layout of bitsandbytes' without a backward pass
    fit_embedding(name, source, model, options)
    return model, sorted(info["missing_keys"])


def fit_embedding(name: str, source: Source, model: PreTrainedModel, options: ModelOptions) -> PreTrainedModel:
    """The model with an embedding for every token of its tokenizer, if it has one."""
    beside = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    told = source.kind == "folder" and any((Path(source.location) / each).is_file() for each in beside)
    if options.add_tokens or told or source.kind == "hub":
        from rlhf_core.models.loading.grow import grow

        tokenizer, added = load_tokenizer(name, options), set[int]()
        if options.add_tokens:
            own = load_tokenizer(name, replace(options, add_tokens=""))
            added = {*tokenizer.get_vocab().values()} - {*own.get_vocab().values()}
        grow(name, model, tokenizer, added)
    return model


def _quantization(options: ModelOptions) -> dict[str, Any]:
    """Return the options that load weights in 4 bits on their device, because moving them later packs them again."""
    if options.quantize == "none":
        return {}
    for package in ("bitsandbytes", "accelerate"):  # transformers needs both
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"quantize needs the package {package!r}: pip install 'rlhf-core[qlora]'")
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, options.compute_dtype),
    )
    return {"quantization_config": config, "device_map": {"": _device()}}


def _device() -> str:
    """This process's device."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _is_classifier(config: PretrainedConfig) -> bool:
    """Return True if the checkpoint was saved as a sequence classifier. `num_labels` is no evidence: every config has it."""
    return any(each.endswith("ForSequenceClassification") for each in config.architectures or ())


def _base(source: Source, options: ModelOptions) -> str:
    """The name of an adapter's base."""
    if options.quantize != "none":
        raise UsageError(
            f"{source.location} is an adapter, which is merged before use and cannot be quantized; quantize its "
            "base instead"
        )
    return read_base_model(Path(source.location))


def _dtype(options: ModelOptions, trained: bool) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if trained else getattr(torch, options.compute_dtype)
    return dtype


def _check_tiny(name: str, options: ModelOptions) -> None:
    if options.quantize != "none":
        raise UsageError(
            f"model {name!r} has random weights and cannot be quantized; save it with a run, and pass that model"
        )


def _tiny_attention(options: ModelOptions) -> str:
    """The attention to make a tiny model with; what packs its rows takes the place of sdpa later."""
    return "sdpa" if options.attention == "varlen" else options.attention


def _check_attention(options: ModelOptions) -> None:
    """Check that the package of flash attention is installed; transformers takes a kernel of the hub for one that is not.

    Raises:
        MissingPackage: neither it nor the package that loads kernels is.
    """
    module, install = FLASH.get(options.attention, ("kernels", "kernels"))
    wanted = options.attention in FLASH or "/" in options.attention
    if wanted and not any(importlib.util.find_spec(each) for each in (module, "kernels")):
        raise MissingPackage(f"attention {options.attention} needs a package: pip install {install}, or choose sdpa")
