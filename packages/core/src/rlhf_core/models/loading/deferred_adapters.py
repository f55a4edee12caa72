"""Merging a saved adapter into a model whose weights are deferred: each weight is merged when it is read.

PEFT puts the adapter on the model, and walks over it to merge, as always. Only the merge of a layer is put off: its weights are
read later into a copy of the layer without its weights, PEFT merges there, and the copy is emptied again.

Adapters that are computed from the base's weights when they are put on (PiSSA, OLoRA, KaSA) cannot wait, and adapters of other
kinds than LoRA may be such. They are read whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.models.loading.deferral import defer, is_deferred, placeholder, read_later

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["can_wait", "merge_later", "overwrite_later", "translate_misfits"]

HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out "
    "inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout modules_to_save "
    "peft_type peft_version r rank_pattern revision target_modules target_parameters task_type trainable_token_indices "
    "use_dora use_rslora".split()
)
"""Settings of LoRA under which an adapter depends on its file alone. A setting that is not listed needs the base's weights."""

STARTS = (True, False, "gaussian")
"""Values of `init_lora_weights` that look at no weight."""


def can_wait(peft: Any, config: Any, model: nn.Module) -> bool:
    """Return True if weights can be merged with an adapter of this configuration one at a time, later."""
    if config.peft_type != peft.PeftType.LORA or config.init_lora_weights not in STARTS:
        return False
    usual = peft.LoraConfig().to_dict()
    changed = {name for name, value in config.to_dict().items() if name not in usual or value != usual[name]}
    return changed <= HARMLESS and not any(isinstance(each, torch.nn.MultiheadAttention) for each in model.modules())


@contextmanager
def translate_misfits(folder: Path) -> Iterator[None]:
    """Turn what PEFT raises about an adapter that does not fit into one line."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"the adapter {folder} does not fit its base: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def overwrite_later(model: nn.Module, file: Path) -> Iterator[None]:
    """Let PEFT write whole weights that an adapter brings into a deferred model, and defer them to the adapter's file.

    Args:
        model: the base; inside the context PEFT puts the adapter on it.
        file: the adapter's weights.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        stored = list(opened.keys())
    keys = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): key for key in stored}
    brought = {
        parameter: partial(_read, file, keys[name], parameter.dtype)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in keys and is_deferred(parameter)
    }
    for parameter in brought:
        parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype)
    yield
    wrappers: list[Any] = list(model.modules())
    for module in wrappers:
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):  # PEFT's wrapper; it has a copy
            for saved in module.modules_to_save.values():
                pairs = zip(saved.parameters(), module.original_module.parameters(), strict=True)
                brought |= {own: brought[original] for own, original in pairs if original in brought}
    for parameter, read in brought.items():
        parameter.data = placeholder(parameter.shape, parameter.dtype)
        defer(parameter, read)


def merge_later(peft: Any, adapted: Any, folder: Path) -> Any:
    """Return the base of an adapter with the adapter merged into each weight when it is read.

    Args:
        peft: the library.
        adapted: its model, a deferred base with the adapter on it.
        folder: of the adapter, for messages.
    """
    merges: list[_Merge] = []
    for layer in list(adapted.modules()):
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.merge = partial(_put_off, layer, folder, merges)
    plain = adapted.merge_and_unload(safe_merge=True)
    for merge in merges:  # a parameter of the model that is reachable from its own read would never be freed
        merge.holder.base_layer = merge.empty
    return plain


@dataclass(frozen=True)
class _Merge:
    """A layer that is merged later."""

    layer: Any
    """PEFT's layer, with its adapter"""
    holder: Any
    """the innermost one of PEFT's layers around the base's"""
    empty: nn.Module
    """the base's layer, without its parameters"""
    reads: dict[str, Callable[[], Tensor]]
    """return the numbers of those parameters before they are merged"""
    folder: Path

    def read(self, name: str) -> Tensor:
        """Return the numbers of a parameter of the layer with the adapter merged into it."""
        parameters = self.empty._parameters
        parameters.update({each: torch.nn.Parameter(read(), requires_grad=False) for each, read in self.reads.items()})
        self.holder.base_layer = self.empty
        try:
            with translate_misfits(self.folder), torch.no_grad():
                type(self.layer).merge(self.layer, safe_merge=True)
            merged: Tensor = self.empty.get_parameter(name).data
        finally:
            self.layer.merged_adapters.clear()
            parameters.update(dict.fromkeys(self.reads))
        return merged


def _put_off(layer: Any, folder: Path, merges: list[_Merge], **_: Any) -> None:
    """Defer the merge of one of PEFT's layers."""
    holder = layer
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    base = holder.base_layer
    empty = copy.copy(base)
    empty._parameters = dict.fromkeys(base._parameters)
    # PEFT's layer around a lone parameter merges that; others change any of their layer's
    names = [layer.parameter_name] if hasattr(layer, "parameter_name") else list(base._parameters)
    own = {name: base._parameters[name] for name in names if base._parameters[name] is not None}
    merges.append(_Merge(layer, holder, empty, {name: read_later(each) for name, each in own.items()}, folder))
    for name, parameter in own.items():
        parameter.data = placeholder(parameter.shape, parameter.dtype)
        defer(parameter, partial(merges[-1].read, name))


def _read(file: Path, key: str, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a file in new memory."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        found: Tensor = opened.get_tensor(key).to(dtype, copy=True)
    return found
