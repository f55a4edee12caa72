"""Building the module of a role: its model loaded by name, the heads that its outputs need, adapters, and frozen parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from rlhf_core.errors import UsageError, options_under, run_option
from rlhf_core.models.ema import Average
from rlhf_core.models.freezing import freeze
from rlhf_core.models.heads.modules import (
    HEADS_FILE,
    SCALAR,
    ChunkedHead,
    ScalarHead,
    check_logits,
    generator_for,
    head_options,
)
from rlhf_core.models.heads.router import check_router
from rlhf_core.models.inputs.packing import can_pack, check_packing
from rlhf_core.models.inputs.vision import Vision
from rlhf_core.models.layer_compiler import compile_layers
from rlhf_core.models.loading.end_tokens import save_ends
from rlhf_core.models.loading.hub import find_companion_file
from rlhf_core.models.loading.image_reader import load_reader
from rlhf_core.models.loading.load import has_scorer, load_model, load_scorer
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.models.lora import adapt
from rlhf_core.models.module import RoleModule

if TYPE_CHECKING:
    from rlhf_core.contract.options import TrainedOptions
    from rlhf_core.contract.plan import RoleSpec
    from rlhf_core.models.lora import Adapters

__all__ = ["add_adapters", "build_module", "check_new_tokens", "prepare_training", "set_pad"]


def build_module(spec: RoleSpec, chunk: int = 1024, temperature: float = 1.0, seed: int = 0) -> RoleModule:
    """The module of a role, in eval mode on the CPU; trained roles in float32 with gradients, frozen ones without.

    Args:
        spec: the role; its options name the model, its outputs decide the heads.
        chunk: completion tokens whose logits are held at a time; 0 holds all.
        temperature: divides the logits.
        seed: of new scalar heads, together with the names of role and head; `--seed` of the run.

    Raises:
        UsageError: the model cannot be loaded, or a frozen role's model lacks the head it is asked for.
    """
    options = spec.options
    adapted = bool(spec.trained and options.lora.rank)  # type: ignore[attr-defined]  # what is trained has them
    vision = _vision(spec)
    model, heads = _with_heads(spec, seed, wide=spec.trained and not adapted)
    check_new_tokens(model, spec)
    if spec.needs_language_head:
        model.set_output_embeddings(
            ChunkedHead(model.get_output_embeddings(), chunk, temperature, **head_options(model.config))
        )
        check_logits(options.model, model)
    _no_dropout(model)
    save_ends(model, spec.ends)
    packing = options.packing and can_pack(model)
    with options_under(f"/{spec.name}"):
        check_packing(model, options, packing)
    adapters = add_adapters(model, spec, seed) if adapted else None
    module = RoleModule(
        model, heads, getattr(torch, options.compute_dtype), adapters, packing, vision, spec.providers
    ).eval()
    prepare_training(module, spec)
    return module


def check_new_tokens(model: Any, spec: RoleSpec) -> None:
    """Raise UsageError if adapters would have to learn tokens that the run adds."""
    new_tokens: int = getattr(model, "new_tokens", 0)
    if new_tokens and spec.trained and spec.options.lora.rank:  # type: ignore[attr-defined]  # what is trained has them
        raise UsageError(
            f"adapters cannot learn the {new_tokens} new tokens of {spec.options.model}: train the {spec.name} without "
            f"{run_option(f'{spec.name}.lora.rank')} first, and add adapters to the result"
        )


def add_adapters(model: Any, spec: RoleSpec, seed: int) -> Adapters:
    """Put the adapters of a trained role into its model."""
    return adapt(model, spec.options.lora, spec.name, f"{seed}/{spec.name}")  # type: ignore[attr-defined]


def prepare_training(module: RoleModule, spec: RoleSpec) -> None:
    """Mark what is trained: everything, adapters and scalar heads (both in float32), or nothing; then the role's options."""
    adapters = module.adapters
    module.requires_grad_(spec.trained and adapters is None)
    if adapters is not None:
        heads_too = nn.ModuleList(module.scalar_heads()).parameters()
        for parameter in (*adapters.parameters(module.model), *heads_too):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    if spec.trained:
        _train(module, spec.options, spec.name)  # type: ignore[arg-type]  # what is trained has them


def _train(module: RoleModule, options: TrainedOptions, role: str) -> None:
    """Prepare a trained role's module, apart from its adapters."""
    if options.gradient_checkpointing:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.compile:
        compile_layers(module.model)
    if options.router_aux_coef:
        check_router(module.model, role)
    module.frozen = freeze(module, options.freeze, role)
    if options.features:
        with options_under(f"/{role}"):
            module.keep_features(options.features)
    if options.ema:
        module.average = Average(module, options.ema)


def _vision(spec: RoleSpec) -> Vision | None:
    """Return how the role's model reads images; None if it reads only text.

    Raises:
        UsageError: it should give values or scores of them.
    """
    options = spec.options
    reader = load_reader(options.model, options)
    if reader is None or (not spec.needs_language_head and has_scorer(options.model, options)):
        return None  # transformers' classifiers of such models have the text's part alone
    if spec.outputs & SCALAR.keys():
        raise UsageError(
            f"the {spec.name} needs a value head, but the vision-language model {options.model} cannot have one: "
            f"choose an algorithm without a critic (grpo, rloo), or a {run_option(f'{spec.name}.model')} that reads "
            "only text"
        )
    return Vision(reader, reader.token)


def _with_heads(spec: RoleSpec, seed: int, wide: bool) -> tuple[Any, dict[str, nn.Module]]:
    """The role's model, and its additional heads. `wide`: in float32 for any compute dtype."""
    options = spec.options
    scalars = [name for output, name in SCALAR.items() if output in spec.outputs]
    if spec.needs_language_head or not scalars or not has_scorer(options.model, options):
        model: Any = load_model(options.model, options, trained=wide)
        return model, _own_heads(spec, model, scalars, seed)
    model, found = load_scorer(options.model, options, trained=wide)
    heads = _own_heads(spec, model, scalars[1:], seed)
    model.score = ScalarHead(model.score)
    if not found:
        _new_head(spec, model.score, scalars[0], seed)
    if spec.trained:
        set_pad(model.config, load_tokenizer(options.model, options))
    return model, heads


def _own_heads(spec: RoleSpec, model: Any, names: list[str], seed: int) -> dict[str, nn.Module]:
    """Return heads that are not part of the model, including those of plugins' outputs; loaded if they are next to it."""
    hidden = model.config.get_text_config().hidden_size
    heads: dict[str, nn.Module] = {name: ScalarHead.new(hidden, model.dtype) for name in names}
    for name, output in spec.providers.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(f"{seed}/{spec.name}/{name}").initial_seed())
            head = output.head(hidden)
        if head is not None:
            heads[name] = head.to(model.dtype)
    file = find_companion_file(spec.options.model, HEADS_FILE) if heads else None
    saved = load_file(file) if file else {}
    for name, head in heads.items():
        own = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
        if own:
            head.load_state_dict(own)
        else:
            _new_head(spec, head, name, seed)
    return heads


def _new_head(spec: RoleSpec, head: nn.Module, name: str, seed: int) -> None:
    """Draw a head's weights; a frozen role has nothing to learn them with, unless it is random altogether."""
    model = spec.options.model
    if not spec.trained and not spec.tracking and not model.startswith("tiny"):
        raise UsageError(
            f"{model!r} has no trained {name} head, so its {name}s would be random; pass a model that was trained "
            f"with one ({run_option(f'{spec.name}.model')})"
        )
    if isinstance(head, ScalarHead):  # a plugin's was drawn when it was made
        head.reset(f"{seed}/{spec.name}/{name}")


def set_pad(config: Any, tokenizer: Any) -> None:
    """Choose a padding token that is not EOS: transformers' classifiers read the last token that is not padding.

    Without another special token it is the last ordinary one, which no row ends with: rows end with an end token.
    """
    text = config.get_text_config()
    ids = [text.pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    known = [each for each in (*ids, *tokenizer.all_special_ids) if each is not None]
    ordinary = max(number for number in tokenizer.get_vocab().values() if number != tokenizer.eos_token_id)
    text.pad_token_id = next((each for each in known if each != tokenizer.eos_token_id), ordinary)


def _no_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in layers and where attention functions read it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
