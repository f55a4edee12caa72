"""A role as a Hugging Face folder that plain transformers loads: weights, config, tokenizer, chat template, model card."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.files import fresh_folder
from rlhf_core.models.load import no_progress_bars

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.models.module import RoleModule

__all__ = ["export"]

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
) -> None:
    """Write `folder`, replacing it only when everything is on the disk.

    Args:
        module: the role's module.
        tokenizer: saved with it, chat template included.
        folder: where.
        base: the model it was trained from, for the card.
        algorithm: what it was trained with, for the card.
        state: the model's tensors by their Hugging Face names where a strategy gathered them; the module's own otherwise.
    """
    from safetensors.torch import save_file

    from rlhf_core.models.module import HEADS_FILE

    model = module.model
    with fresh_folder(Path(folder)) as target, no_progress_bars():
        if module.adapters is not None:
            module.adapters.save(target, base, getattr(model, "score", None))
        else:
            model.save_pretrained(target, state_dict=None if state is None else dict(state), max_shard_size=SHARD)
        if heads := dict(module.heads.state_dict()):
            save_file({name: tensor.contiguous() for name, tensor in heads.items()}, target / HEADS_FILE)
        _padding_like(model, tokenizer).save_pretrained(target)
        (target / "README.md").write_text(_card(type(model).__name__, base, algorithm), encoding="utf-8")


def _padding_like(model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with what a classifier takes for padding; it reads the last token that is not."""
    pad = model.config.get_text_config().pad_token_id if hasattr(model, "score") else None
    if pad is None or pad == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def _card(model_class: str, base: str, algorithm: str) -> str:
    """A model card to complete."""
    name = Path(base).name if Path(base).exists() else base  # a folder's place on this machine is nobody's business
    hub = f"base_model: {base}\n" if "/" in base and not Path(base).exists() else ""
    return (
        f"---\nlibrary_name: transformers\n{hub}tags: [rlhf, {algorithm}]\n---\n\n"
        f"# {name}, trained with {algorithm}\n\n"
        f"A `{model_class}` trained from `{name}` with `{algorithm}` by rlhf-core.\n\n"
        "Training data, evaluation and intended use: to be written by whoever publishes this model.\n"
    )
