"""A role as a Hugging Face folder that plain transformers loads: weights, config, tokenizer, chat template, model card.

With adapters it is a PEFT folder: the adapters, and the head of a classifier. The model `tiny` is nowhere to be loaded from, so
that it lies in the folder `base` beside its adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.models.export.card import Card
from rlhf_core.models.loading.load import load_model
from rlhf_core.models.loading.names import find
from rlhf_core.models.loading.transformers_calls import no_progress_bars
from rlhf_core.util.atomic_files import fresh_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.models.module import RoleModule

__all__ = ["export", "padding_like"]

SHARD = "5GB"
"""Largest weights file: what the hub and slow disks take without trouble."""


def export(
    module: RoleModule,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    base: str,
    algorithm: str,
    state: Mapping[str, Tensor] | None = None,
    own: Mapping[str, Tensor] | None = None,
    shard: str = SHARD,
) -> None:
    """Write `folder`, replacing it only when everything is on the disk.

    Args:
        module: the role's module.
        tokenizer: saved with it, chat template included.
        folder: where.
        base: the model it was trained from, for the card and the adapters.
        algorithm: what it was trained with, for the card.
        state: the model's tensors by their Hugging Face names where a strategy gathered them; the module's own otherwise.
        own: what `RoleModule.own_weights` gives, likewise.
        shard: largest weights file.
    """
    from safetensors.torch import save_file

    from rlhf_core.models.heads.modules import HEADS_FILE

    model, adapters = module.model, module.adapters
    own = module.own_weights() if own is None else own
    with fresh_folder(Path(folder)) as target, no_progress_bars():
        if adapters is not None:
            adapters.save(target, base, _inside(own, "model."))
            if model.can_generate():
                model.generation_config.save_pretrained(target)  # its end tokens, for whoever merges
            if find(base).kind == "tiny":
                _save_tiny(base, target / "base")
        else:
            model.save_pretrained(target, state_dict=None if state is None else dict(state), max_shard_size=shard)
        if heads := _inside(own, "heads."):
            save_file({name: tensor.cpu().contiguous() for name, tensor in heads.items()}, target / HEADS_FILE)
        if module.vision is not None:
            module.vision.reader.save(target)
        else:
            padding_like(model, tokenizer).save_pretrained(target)
        card = Card(base, algorithm).text(type(model).__name__, adapters is not None, hasattr(model, "score"))
        (target / "README.md").write_text(card, encoding="utf-8")


def padding_like(model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with what a classifier takes for padding; it reads the last token that is not."""
    pad = model.config.get_text_config().pad_token_id if hasattr(model, "score") else None
    if pad is None or pad == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def _inside(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _save_tiny(name: str, folder: Path) -> None:
    from rlhf_core.contract.options import ModelOptions

    load_model(name, ModelOptions()).save_pretrained(folder)
