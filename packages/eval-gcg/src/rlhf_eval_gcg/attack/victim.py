"""A model under attack: forward passes over rows that share beginnings, with logits at the answer's positions alone.

Shapes: B rows, N tokens of a row that are computed, K positions whose logits are kept, V vocabulary, H embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.caching import Beginning, cache_window, noting_cache, shared_cache
from rlhf_eval_gcg.attack.flops import Costs
from rlhf_eval_gcg.attack.gated_layers import gated_layers, in_place
from rlhf_eval_gcg.attack.packing import PackedGroups, can_attend

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Group", "Victim"]

TABLE_ROWS = 16384
"""Rows of an embedding that is no plain table, computed at a time."""


@dataclass(frozen=True)
class Group:
    """Rows of one length after one beginning."""

    beginning: Beginning
    """tokens before the rows"""
    rows: Tensor
    """token ids (B, N) or embeddings (B, N, H) after the beginning"""
    keep: int
    """number of last positions whose logits are wanted"""


class Victim:
    """A causal language model of transformers, in evaluation mode.

    Args:
        model: the model.
        prefix_cache: share keys and values between rows where the architecture allows it.
        flop_rule: how operations are counted.
    """

    def __init__(self, model: Any, prefix_cache: bool = True, flop_rule: str = "counted") -> None:
        self.model = model
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.device = self.embedding.weight.device
        self.costs = Costs.measure(model, flop_rule)
        self.layers, self.window = cache_window(model) if prefix_cache else (0, 0.0)
        parameters = inspect.signature(model.forward).parameters
        self._keeps, self.takes_positions = "logits_to_keep" in parameters, "position_ids" in parameters
        self._text_config = model.config.get_text_config(decoder=True)
        self.packs = self.on_cpu and self.layers > 0 and self.takes_positions and can_attend(model)
        """rows after shared beginnings are packed without padding, and attend without copies of the beginnings"""
        self._gated = gated_layers(model) if self.packs else []

    @property
    def on_cpu(self) -> bool:
        """True if the model is computed by the CPU."""
        return bool(self.device.type == "cpu")

    @property
    def vocabulary(self) -> int:
        """Number of the embedding's tokens."""
        return int(self.embedding.num_embeddings)

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """Evaluate without gradients of weights; put everything back afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        wanted = [(weight, weight.requires_grad) for weight in self.model.parameters()]
        try:
            self.model.eval()
            for weight, _ in wanted:
                weight.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for weight, needed in wanted:
                weight.requires_grad_(needed)

    def caches(self, length: int) -> bool:
        """Return True if rows of a text of `length` tokens can share keys and values."""
        return self.layers > 0 and length < self.window

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids, scaled as the model scales them."""
        found: Tensor = self.embedding(ids)
        return found

    def over_tokens(self, gradient_LH: Tensor, tokens: int) -> Tensor:
        """Return gradient · embedding for each of the first `tokens` tokens (L, V), float32: the chain rule of a one-hot."""
        if type(self.embedding) is torch.nn.Embedding:
            weight_VH = self.embedding.weight[:tokens].detach()
            return (gradient_LH.to(weight_VH.dtype) @ weight_VH.T).float()
        parts = torch.arange(tokens, device=self.device).split(TABLE_ROWS)
        with torch.no_grad():
            return torch.cat([(gradient_LH.float() @ self.embed(part).float().T) for part in parts], 1)

    def logits(self, groups: Sequence[Group], record: bool = False) -> tuple[list[Tensor], list[Any]]:
        """Return the logits (B, K, V) of each group, and what each layer computed for all rows if `record`.

        Groups of one call are one batch. Several are padded on the left, or packed where the model can.
        """
        if self.packs and not record and not torch.is_grad_enabled() and any(len(each.beginning) for each in groups):
            return self._packed_logits(groups), []
        mask, positions = _padding(groups, self.device) if len(groups) > 1 else (None, None)
        rows = _pad_left([each.rows for each in groups])
        inputs: dict[str, Any] = {"inputs_embeds" if rows.is_floating_point() else "input_ids": rows}
        if mask is not None:
            inputs |= {"attention_mask": mask, "position_ids": positions}
        cached = record or any(len(each.beginning) for each in groups)
        cache = None
        if cached:
            pairs = [(each.beginning, len(each.rows)) for each in groups]
            inputs["past_key_values"] = cache = shared_cache(pairs, self.layers, record)
        keep = max(each.keep for each in groups)
        if self._keeps:
            inputs["logits_to_keep"] = keep
        with _folded_input(self.head):
            logits = self.model(**inputs, use_cache=cached, return_dict=True).logits[:, -keep:]
        parts = logits.split([len(each.rows) for each in groups])
        found = [part[:, -each.keep :] for part, each in zip(parts, groups, strict=True)]
        return found, [layer.fresh for layer in cache.layers] if record and cache is not None else []

    def _packed_logits(self, groups: Sequence[Group]) -> list[Tensor]:
        """Return the logits (B, K, V) of each group from one long row."""
        sizes = [(each.rows.shape[0], each.rows.shape[1]) for each in groups]
        packed = PackedGroups(sizes, [each.beginning.layers or None for each in groups])
        positions, kept, begin = [], [], 0
        for each, (rows, new) in zip(groups, sizes, strict=True):
            past = len(each.beginning)
            positions.append(torch.arange(past, past + new, device=self.device).repeat(rows))
            places_BN = torch.arange(begin, begin + rows * new, device=self.device).view(rows, new)
            kept.append(places_BN[:, new - each.keep :].flatten())
            begin += rows * new
        row = torch.cat([each.rows.flatten(0, 1) for each in groups])[None]
        inputs: dict[str, Any] = {"inputs_embeds" if row.is_floating_point() else "input_ids": row}
        inputs |= {
            "position_ids": torch.cat(positions)[None],
            "past_key_values": noting_cache(packed.note, self.layers),
        }
        kept_M = torch.cat(kept)
        if self._keeps:
            inputs["logits_to_keep"] = kept_M
        with packed.install(self._text_config), _folded_input(self.head), in_place(self._gated):
            logits_MV = self.model(**inputs, use_cache=True, return_dict=True).logits[0]
        if not self._keeps:
            logits_MV = logits_MV[kept_M]
        parts = logits_MV.split([rows * each.keep for each, (rows, _) in zip(groups, sizes, strict=True)])
        return [part.unflatten(0, (-1, each.keep)) for part, each in zip(parts, groups, strict=True)]


@contextmanager
def _folded_input(head: Any) -> Iterator[None]:
    """Give inputs of the output layer the strides of one matrix; else torch multiplies each row by a copy of frozen weights.

    `contiguous` is not enough: the last positions of a single row count as contiguous, with the strides of the whole row.
    """
    if head is None:
        yield
        return

    def fold(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = inputs[0]
        return rows.reshape(-1, rows.shape[-1]).view(rows.shape), *inputs[1:]

    hook = head.register_forward_pre_hook(fold)
    try:
        yield
    finally:
        hook.remove()


def _pad_left(rows: Sequence[Tensor]) -> Tensor:
    """Return groups of rows as one batch, padded on the left by zeros."""
    if len(rows) == 1:
        return rows[0]
    longest = max(each.shape[1] for each in rows)
    behind = (0, 0) if rows[0].is_floating_point() else ()
    pad = torch.nn.functional.pad
    return torch.cat([pad(each, (*behind, longest - each.shape[1], 0)) for each in rows])


def _padding(groups: Sequence[Group], device: Any) -> tuple[Tensor, Tensor]:
    """Return attention mask (B, P + N) and positions (B, N) of groups padded on the left, beginnings and rows apart."""
    past = max(len(each.beginning) for each in groups)
    longest = max(each.rows.shape[1] for each in groups)
    masks, positions = [], []
    for each in groups:
        start, new = len(each.beginning), each.rows.shape[1]
        mask = torch.zeros(past + longest, dtype=torch.long, device=device)
        mask[past - start : past] = 1
        mask[past + longest - new :] = 1
        place = torch.arange(start - (longest - new), start + new, device=device).clamp(min=0)
        masks.append(mask.expand(len(each.rows), -1))
        positions.append(place.expand(len(each.rows), -1))
    return torch.cat(masks), torch.cat(positions)
