"""Rows that several ranks compute together: a rank holds a part of the tokens, and so 1 / ranks of the activations.

Attention is DeepSpeed's Ulysses (Jacobs et al. 2023) around core's packed attention, or a ring (`ring`). Under Ulysses the
ranks exchange stretches of all heads for all tokens of some heads, each attends, and they exchange back: heads bound the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.contract.distributed import TorchWorld, World, data_world
from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.lazy import torch
from rlhf_strategy_deepspeed.engine import library, silence_deepspeed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["join_rows"]


def join_rows(module: Any, options: DeepSpeedOptions) -> World:
    """Return the ranks that have their own rows; with a `sequence` of several ranks, let those of a row share its tokens.

    Raises:
        UsageError: the model's heads or layers do not allow it.
    """
    if options.sequence == 1:
        return TorchWorld()
    from rlhf_core.models.inputs.packed_attention import NAME
    from rlhf_core.models.inputs.packing import has_chunks
    from rlhf_core.models.inputs.sequence import SequenceShards
    from rlhf_strategy_deepspeed.ring import RingAttention, check_layers, zigzag

    world = data_world(options.sequence)
    group = world.neighbors
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    text = module.model.config.get_text_config(decoder=True)
    ring = options.sequence_kind == "ring"
    if ring:
        check_layers(text)
    else:
        _check_heads(text, size)
    if not module.packing or text._attn_implementation != NAME:
        if has_chunks(text):
            raise OptionError(
                "sequence",
                f"{size} cuts packed rows, but this model has chunked_attention layers, which need whole rows; leave it out",
            )
        raise UsageError(
            f"{option('sequence', size)} cuts packed rows, which this model's attention {text._attn_implementation!r} does not "
            "take; use attention sdpa and packing, or leave it out"
        )
    pieces = zigzag(rank, size) if ring else (rank,)
    module.sequence = SequenceShards(pieces, size, group, RingAttention(group) if ring else _Exchange(text, group))
    return world


def _check_heads(text: Any, size: int) -> None:
    """Refuse a number of ranks that heads cannot be dealt to."""
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if heads % size or (groups % size and size % groups):
        raise OptionError(
            "sequence",
            f"{size} must divide the {heads} attention heads, and must divide the {groups} key heads or be a "
            f"multiple of them; choose another number, or {option('sequence_kind', 'ring')}",
        )


class _Exchange:
    """Attention of a stretch to whole rows."""

    def __init__(self, text: Any, group: Any) -> None:
        with silence_deepspeed():
            library().init_distributed(
                auto_mpi_discovery=False, verbose=False
            )  # it takes the process group that there is
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        from rlhf_core.models.inputs.packed_attention import packed_attention

        heads = text.num_attention_heads
        self.ulysses = UlyssesSPAttentionHF(
            attn=packed_attention,
            batch_size=1,
            attn_head_count=heads,
            attn_head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            kv_head_count=text.num_key_value_heads,
            num_hidden_layers=text.num_hidden_layers,
            process_group=group,
            seq_length_is_variable=True,
        )

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        places = torch.zeros(1, query.shape[2], dtype=torch.int64, device=query.device)
        groups: Any = getattr(module, "num_key_value_groups", None)
        kwargs["position_ids"] = places  # it gathers them for kernels that read rows from positions; ours reads bounds
        output, _ = self.ulysses(module, query, key, value, None, **kwargs)
        if (
            groups is not None
        ):  # it sets the number that holds for its own heads, where the model sampled with the whole
            module.num_key_value_groups = groups
        attended: Tensor = output.view(1, query.shape[2], query.shape[1], -1)
        return attended
