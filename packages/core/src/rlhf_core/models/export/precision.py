"""The dtype in which weights are written: the base model's own, or one that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.models.loading.adapters import read_base_model
from rlhf_core.models.loading.hub import find_companion_file, resolve_name
from rlhf_core.models.loading.transformers_calls import read_config
from rlhf_core.util.atomic_files import write_text
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import ModelOptions

__all__ = ["fitting_dtype", "saved_dtype", "write_dtype"]


def saved_dtype(wanted: str, name: str, options: ModelOptions) -> torch.dtype:
    """Return the dtype to write: `wanted`, or for `base` that of the model called `name`, as plain transformers loads it."""
    if wanted != "base":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    source = resolve_name(name)
    if source.kind == "tiny":
        return torch.float32
    if source.kind == "adapter":
        return saved_dtype(wanted, read_base_model(Path(source.location)), options)
    config = read_config(name, source, options)
    named = config.dtype or config.get_text_config().dtype or _dtype_of_weights(name)
    found: torch.dtype = getattr(torch, named) if isinstance(named, str) else named
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def _dtype_of_weights(name: str) -> torch.dtype:
    """Return the dtype of the first floating-point weight of a checkpoint whose configuration names none."""
    from safetensors import safe_open

    index = find_companion_file(name, "model.safetensors.index.json")
    file = "model.safetensors"
    if index is not None:
        file = next(iter(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    path = find_companion_file(name, file)
    if path is not None:
        with safe_open(path, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  no dictionary
                dtype: torch.dtype = weights.get_tensor(key).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def fitting_dtype(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`; float32 with a warning if it is float16 and a weight is beyond its range.

    All of `weights` are read if it is float16, and none otherwise: bfloat16 has the range of float32.
    """
    if dtype != torch.float16:
        return dtype
    beyond = [
        name
        for name, each in weights
        if each.is_floating_point() and bool((torch.isinf(each.to(dtype)) & ~torch.isinf(each)).any())
    ]
    if beyond:
        log.warning(f"{beyond[0]} has weights outside the range of float16, so the model is saved in float32")
    return torch.float32 if beyond else dtype


def write_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let a saved config.json name `dtype` wherever it names one: transformers writes that of the weights in memory."""
    config = json.loads(path.read_text(encoding="utf-8"))
    _replace_dtype(config, str(dtype).removeprefix("torch."))
    write_text(path, json.dumps(config, indent=2) + "\n")


def _replace_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key == "dtype" and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict):
            _replace_dtype(value, name)
