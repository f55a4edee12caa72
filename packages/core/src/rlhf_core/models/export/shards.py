"""A model's weights written a file at a time as they arrive, so that no host holds the whole model a second time.

A strategy that shards weights gathers them a bucket at a time. The process that writes keeps the tensors of one file and no
others. Files are named when their number is known, as transformers names them.

Whole state dicts remain where transformers needs them: models with a `save_pretrained` of their own, and architectures whose
saved format joins several parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["parse_bytes", "write_weights"]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Named = Iterable[tuple[str, "Tensor"]]


def write_weights(model: Any, target: Path, weights: Named, dtype: torch.dtype, shard: str) -> None:
    """Write configuration and weights of a Hugging Face model into the folder `target`.

    Args:
        model: the model, whose own weights are not read.
        target: the folder.
        weights: names and tensors, taken one at a time.
        dtype: of floating-point weights.
        shard: largest file, such as `5GB`.

    Raises:
        OptionError: `shard` is no size.
    """
    largest = parse_bytes(shard)
    cast = ((name, each.to(dtype) if each.is_floating_point() else each) for name, each in weights)
    if not _takes_single_weights(model):
        model.save_pretrained(target, state_dict={name: each.cpu() for name, each in cast}, max_shard_size=largest)
        return
    model.save_pretrained(target, state_dict={})
    ignored = set(model._keys_to_ignore_on_save or ())
    _write_files(target, _in_saved_format(model, ((name, each) for name, each in cast if name not in ignored)), largest)


def parse_bytes(size: str) -> int:
    """Return the bytes of a size such as `5GB`, `500MB` or `1000`.

    Raises:
        OptionError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", size.strip().upper())
    number = found and found.group(2) in UNITS and int(float(found.group(1)) * UNITS[found.group(2)])
    if not number:
        raise OptionError("/export_shard", f"{size!r} is not a size; write 5GB or 500MB")
    return number


def _takes_single_weights(model: Any) -> bool:
    """Return True if transformers saves the model itself, and each of its saved tensors comes from one parameter."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

    if not isinstance(model, PreTrainedModel) or type(model).save_pretrained is not PreTrainedModel.save_pretrained:
        return False
    reverse = [each.reverse_transform() for each in _conversions(model)]
    return not any(isinstance(each, WeightConverter) and len(each.source_patterns) > 1 for each in reverse)


def _conversions(model: Any) -> list[Any]:
    """Return the differences between the names and shapes of the model's parameters and those of its saved format."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = vars(model).get("_weight_conversions")
    return list(get_model_conversion_mapping(model, add_legacy=False) if known is None else known)


def _in_saved_format(model: Any, weights: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield weights as the model's saved format has them: renamed, or fused experts one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    if not _conversions(model):
        yield from weights
        return
    for name, tensor in weights:
        yield from revert_weight_conversion(model, {name: tensor}).items()


def _write_files(target: Path, weights: Named, largest: int) -> None:
    """Write `model.safetensors`, or numbered files with an index; the last file may be small, and a large tensor is alone."""
    from safetensors.torch import save_file

    names: list[list[str]] = []
    held: dict[str, Tensor] = {}
    bytes_held = total = parameters = 0

    def flush(tensors: dict[str, Tensor]) -> None:
        names.append(list(tensors))
        save_file(tensors, _file_path(target, len(names)), metadata={"format": "pt"})

    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        total, parameters = total + size, parameters + tensor.numel()
        if size > largest:
            flush({name: tensor.cpu().contiguous()})
            continue
        if held and bytes_held + size > largest:
            flush(held)
            held, bytes_held = {}, 0
        held[name] = tensor.cpu().contiguous()
        bytes_held += size
        del tensor
    if held or not names:
        flush(held)
    if len(names) == 1:
        _file_path(target, 1).replace(target / "model.safetensors")
        return
    files = [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    for number, file in enumerate(files, 1):
        _file_path(target, number).replace(target / file)
    places = {name: file for file, inside in zip(files, names, strict=True) for name in inside}
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _file_path(target: Path, number: int) -> Path:
    """Return the name of a file until the number of all files is known."""
    return target / f"weights-{number:05d}.safetensors"
