"""Limits of a model that rows, samples and engines keep to: its positions, its heads, and the ids that its tokenizer has."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.models.loading import tiny
from rlhf_core.models.loading.adapters import read_base_model
from rlhf_core.models.loading.hub import resolve_name
from rlhf_core.models.loading.transformers_calls import read_config

if TYPE_CHECKING:
    from rlhf_core.contract.options import ModelOptions

__all__ = ["attention_heads", "end_of_vocabulary", "lacking_ids", "most_positions", "window_of"]


def most_positions(name: str, options: ModelOptions) -> int | None:
    """Return how many tokens the model called `name` has positions for; None where it knows no such limit."""
    source = resolve_name(name)
    if source.kind == "tiny":
        return tiny.parse(name).context
    if source.kind == "adapter":
        return most_positions(read_base_model(Path(source.location)), options)
    return window_of(read_config(name, source, options))


def attention_heads(name: str, options: ModelOptions) -> tuple[int, int] | None:
    """Return how many heads for queries, and for keys and values, a layer of a model has; None where its config does not say.

    Args:
        name: of the model.
        options: of its role.
    """
    source = resolve_name(name)
    if source.kind == "tiny":
        size = tiny.parse(name)
        return size.heads, size.kv_heads
    if source.kind == "adapter":
        return attention_heads(read_base_model(Path(source.location)), options)
    text = read_config(name, source, options).get_text_config(decoder=True)
    heads: int | None = getattr(text, "num_attention_heads", None)
    return (heads, getattr(text, "num_key_value_heads", None) or heads) if heads else None


def window_of(config: Any) -> int | None:
    """Return the positions that a model's config states."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


@lru_cache(maxsize=8)
def lacking_ids(tokenizer: Any, width: int) -> tuple[int, ...]:
    """Return the ids below `width`, that of a head, for which the tokenizer has no token: heads are padded to round sizes."""
    known = {*tokenizer.get_vocab().values()}
    return tuple(number for number in range(width) if number not in known)


@lru_cache(maxsize=8)
def end_of_vocabulary(tokenizer: Any) -> int:
    """Return the number after the tokenizer's last id."""
    last: int = max(tokenizer.get_vocab().values())
    return last + 1
