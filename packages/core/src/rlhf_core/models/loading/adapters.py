"""Saved adapters: a PEFT folder is a model too, its base with the adapter merged into it.

Every adapter that PEFT can merge can be read: LoRA with its variants and others. The base is what the adapter's
config names, as `rlhf-run` understands names. Only `adapter_model.safetensors` is read: pickled adapters could run code.
"""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.models.loading.deferral import is_deferred, read_whole
from rlhf_core.models.loading.deferred_adapters import can_wait, merge_later, overwrite_later, translate_misfits
from rlhf_core.models.loading.optional_imports import import_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["has_score", "merge_adapter", "read_base_model"]

WEIGHTS = "adapter_model.safetensors"


def read_base_model(folder: Path) -> str:
    """The model that the adapter in `folder` belongs to: the one in its folder `base`, if it has one, else what it names.

    Raises:
        UsageError: it names none, or its weights are not in safetensors format.
    """
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder} is an adapter without {WEIGHTS}; pickled weights can run code and are not loaded")
    if (folder / "base" / "config.json").is_file():
        return str(folder / "base")
    base = _config(folder).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{folder}/adapter_config.json has no base_model_name_or_path; add the model that it adapts")
    return str(base)


def has_score(folder: Path) -> bool:
    """Return True if the adapter contains the head `score` of a classifier."""
    return "score" in (_config(folder).get("modules_to_save") or ())


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model`, the adapter's base, with the adapter merged into its weights.

    Raises:
        UsageError: the adapter does not fit.
        MissingPackage: PEFT is not installed.
    """
    peft = import_peft(f"{folder} is an adapter, which")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # merging is the same for all tasks, and an SFT adapter may start a reward model
    if not hasattr(model, "score"):
        config.modules_to_save = None
    later = any(map(is_deferred, model.parameters())) and can_wait(peft, config, model)
    if not later:
        read_whole(model, f"{folder} is an adapter of a kind that is computed from them")
    with translate_misfits(folder):
        with warnings.catch_warnings(), overwrite_later(model, folder / WEIGHTS) if later else nullcontext():
            warnings.simplefilter("ignore")  # a head that this model lacks is reported as a missing key
            adapted: Any = peft.PeftModel.from_pretrained(model, str(folder), config=config)
        plain: PreTrainedModel = (
            merge_later(peft, adapted, folder) if later else adapted.merge_and_unload(safe_merge=True)
        )
    return plain


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{folder}/adapter_config.json is not valid JSON: {error}") from None
    return config
