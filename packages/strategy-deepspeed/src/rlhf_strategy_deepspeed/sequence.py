"""Rows that several ranks compute together: DeepSpeed's Ulysses (Jacobs et al. 2023) around core's packed attention.

A rank holds a stretch of the tokens. For attention the ranks exchange stretches of all heads for all tokens of some heads, each
attends, and they exchange back. So a rank holds 1 / ranks of the activations, and heads bound the number of ranks.

Left out: ring attention (`ring-flash-attn`), whose shards are of another order of tokens, and which runs on GPUs alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.contract.distributed import TorchWorld, World, data_world
from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.lazy import torch
from rlhf_strategy_deepspeed.engine import library, silence_deepspeed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["join_rows"]


def join_rows(module: Any, together: int) -> World:
    """Return the ranks that have their own rows; with more `together` than one, let those of a row share its tokens.

    Raises:
        UsageError: the model's heads or layers do not allow it.
    """
    from rlhf_core.models.inputs.packed_attention import NAME
    from rlhf_core.models.inputs.sequence import SequenceShards

    if together == 1:
        return TorchWorld()
    world = data_world(together)
    group = world.neighbors
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    text = module.model.config.get_text_config(decoder=True)
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if heads % size or (groups % size and size % groups):
        raise OptionError(
            "sequence",
            f"{size} must divide the {heads} attention heads, and must divide the {groups} key heads or be a "
            "multiple of them; choose another number",
        )
    if not module.packing or text._attn_implementation != NAME:
        raise UsageError(
            f"{option('sequence', size)} cuts packed rows, which this model's attention {text._attn_implementation!r} does not "
            "take; use attention sdpa and packing, or leave it out"
        )
    module.sequence = SequenceShards(rank, size, group, _Exchange(text, group))
    return world


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
