"""A role as a Hugging Face folder that plain transformers loads: weights, config, tokenizer, chat template, model card.

With adapters it is a PEFT folder: the adapters, and the head of a classifier. The model `tiny` is nowhere to be loaded from, so
that is in the folder `base` next to its adapters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.models.export.card import Card
from rlhf_core.models.export.precision import fitting_dtype, write_dtype
from rlhf_core.models.export.shards import write_weights
from rlhf_core.models.loading.load import load_model
from rlhf_core.models.loading.names import find
from rlhf_core.models.loading.transformers_calls import no_progress_bars
from rlhf_core.util.atomic_files import fresh_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.models.module import RoleModule

__all__ = ["export", "padding_like", "with_template", "write_folder"]

SHARD = "5GB"
"""Largest weights file: what the hub and slow disks take without trouble."""


def export(
    module: RoleModule,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    base: str,
    algorithm: str,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None,
    own: Mapping[str, Tensor] | None = None,
    shard: str = SHARD,
    dtype: torch.dtype = torch.float32,
    template: str = "",
) -> None:
    """Write `folder`, replacing it only when everything is on the disk.

    Args:
        module: the role's module.
        tokenizer: saved with it, its chat template included.
        folder: where.
        base: the model it was trained from, for the card and the adapters.
        algorithm: what it was trained with, for the card.
        state: the model's tensors by their Hugging Face names where a strategy gathers them; the module's own otherwise. Of
            an iterable of pairs one tensor is taken at a time, and `dtype` must hold all of them (`fitting_dtype`).
        own: what `RoleModule.own_weights` gives, likewise.
        shard: largest weights file.
        dtype: of the model's weights; adapters and additional heads stay as they are.
        template: a chat template that is saved in place of the tokenizer's or processor's; theirs if empty.
    """
    if state is None:
        state = dict(module.hf_weights()) if module.adapters is None else {}
    if isinstance(state, Mapping):
        dtype = fitting_dtype(state.items(), dtype)
    own = module.own_weights() if own is None else own
    with fresh_folder(Path(folder)) as target:
        place = _place_of(base, Path(folder))
        how: dict[str, Any] = {"shard": shard, "dtype": dtype, "template": template}
        write_folder(module, tokenizer, target, base=place, state=state, own=own, **how)
        if module.adapters is not None and find(base).kind == "tiny":
            _save_tiny(base, target / "base")
        card = Card(base, algorithm).text(type(module.model).__name__, module.adapters is not None, _scores(module))
        (target / "README.md").write_text(card, encoding="utf-8")


def write_folder(
    module: RoleModule,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    base: str,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    own: Mapping[str, Tensor],
    shard: str = SHARD,
    dtype: torch.dtype = torch.float32,
    template: str = "",
) -> None:
    """Write all of `export`'s folder but the card into the empty folder `target`; the arguments are its."""
    from safetensors.torch import save_file

    from rlhf_core.models.heads.modules import HEADS_FILE

    model, adapters = module.model, module.adapters
    # transformers imports DeepSpeed here if it is installed, whose first line goes to standard output: `eval` has a JSON there
    with no_progress_bars(), redirect_stdout(sys.stderr):
        if adapters is not None:
            adapters.save(target, base, _inside(own, "model."))
            if model.can_generate():
                model.generation_config.save_pretrained(target)  # its end tokens, for a later merge
        else:
            write_weights(model, target, state.items() if isinstance(state, Mapping) else state, dtype, shard)
            if (target / "config.json").exists():  # a model that is none of transformers writes no such file
                write_dtype(target / "config.json", dtype)
        if heads := _inside(own, "heads."):
            save_file({name: tensor.cpu().contiguous() for name, tensor in heads.items()}, target / HEADS_FILE)
        if module.vision is not None:
            module.vision.reader.save(target, template)
        else:
            with_template(padding_like(model, tokenizer), template).save_pretrained(target)


def _place_of(base: str, folder: Path) -> str:
    """Return where plain transformers finds the base of the adapters in `folder`; a model in a package keeps its name."""
    if find(base).kind == "tiny":
        return str(folder.resolve() / "base")
    path = Path(base).expanduser()
    return str(path.resolve()) if path.exists() else base


def _scores(module: RoleModule) -> bool:
    """Return True if the model is a sequence classifier."""
    return hasattr(module.model, "score")


def padding_like(model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with what a classifier takes for padding; it reads the last token that is not."""
    pad = model.config.get_text_config().pad_token_id if hasattr(model, "score") else None
    if pad is None or pad == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def with_template(tokenizer: Any, template: str) -> Any:
    """Return the tokenizer or processor with another chat template, the only one that it has; itself if `template` is empty."""
    if not template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def _inside(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _save_tiny(name: str, folder: Path) -> None:
    from rlhf_core.contract.options import ModelOptions

    load_model(name, ModelOptions()).save_pretrained(folder)
