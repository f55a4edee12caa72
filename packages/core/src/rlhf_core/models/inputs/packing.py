"""Rows one after another in a single long row, so that no padding is computed: what packing is here.

A micro-batch's rows are placed end to end, positions begin anew with each, and attention stays inside a row. Everything
that works token by token (embeddings, projections, norms, the feed-forward parts: nearly all of the work) then sees
real tokens only. Attention takes the rows' bounds: flash attention as its variable-length kernel does, and `sdpa`
through torch's own such kernel on CUDA and one call for each run of equally long rows on the CPU
(`models.inputs.packed_attention`); no mask of (tokens, tokens) exists. Elsewhere, such as in float32 on a GPU, rows are
padded to the longest of their micro-batch, which holds rows of like length.

Support of an architecture is tested, not listed: it must support flash attention, which requires it to pass its
attention function everything (sliding windows are an argument), and a forward pass over two packed rows must give what two
separate rows give. Recurrent layers and convolutions over time fail that and stay padded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.models.inputs.packed_attention import NAME, register, uses_flash, varlen_obstacle
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.models.inputs.arrange import Inputs

__all__ = ["PackedRows", "can_pack", "check_packing", "has_chunks", "pack_rows"]


@dataclass(frozen=True)
class PackedRows:
    """Inputs of a model's body."""

    ids_1S: Tensor
    """int64 token ids of all rows, end to end"""
    positions_1S: Tensor
    """int64, from 0 in each row"""
    bounds: Tensor
    """int32 (rows + 1), where each row begins, and the end"""
    longest: int
    """tokens of the longest row"""

    def arguments(self, flash: bool) -> dict[str, Any]:
        """Keyword arguments of a body's forward pass, in transformers' own names."""
        # a mask of four dimensions is passed on as it is: none is made, and `rows_attention` needs none
        mask = None if flash else self.ids_1S.new_ones(1, 1, 1, 1, dtype=torch.bool)
        return {
            "input_ids": self.ids_1S,
            "position_ids": self.positions_1S,
            "attention_mask": mask,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def pack_rows(inputs: Inputs) -> tuple[PackedRows, Inputs]:
    """The rows without their padding, and `inputs` with its positions counted in them."""
    N, S = inputs.ids_NS.shape
    lengths_N = inputs.row_ends - torch.arange(N, device=inputs.ids_NS.device) * S + 1
    real_NS = torch.arange(S, device=lengths_N.device) < lengths_N[:, None]
    place_NS = real_NS.flatten().cumsum(0) - 1
    rows = PackedRows(
        ids_1S=inputs.ids_NS[real_NS][None],
        positions_1S=torch.arange(S, device=lengths_N.device).expand(N, S)[real_NS][None],
        bounds=torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0)).int(),
        longest=S,
    )
    return rows, replace(inputs, states_M=place_NS[inputs.states_M], last_N=place_NS[inputs.last_N])


def has_chunks(text: Any) -> bool:
    """Return True if a text config has layers in which a token attends to those of its chunk of the row alone."""
    return "chunked_attention" in (getattr(text, "layer_types", None) or ())


def can_pack(model: Any) -> bool:
    """Return True if the model's attention can keep rows apart; if it is `sdpa`, it becomes `packed_attention`.

    Tried out on two rows of three tokens, where the model is; flash attention, which has no CPU, is taken at its word.
    Layers that attend within chunks (Llama 4) get these in a mask, which packed rows do not have.
    """
    text = model.config.get_text_config(decoder=True)
    if has_chunks(text):
        return False
    flash = uses_flash(text)
    supported = model._supports_flash_attn and model._supports_attention_backend
    if flash or not supported or text._attn_implementation != "sdpa":
        return bool(flash and supported)
    register()
    text._attn_implementation = NAME
    if not _isolates_rows(model):
        text._attn_implementation = "sdpa"
        return False
    return True


@torch.no_grad()
def _isolates_rows(model: Any) -> bool:
    """Return True if two packed rows have the same states as two separate rows."""
    body = model.base_model
    ids_NS = torch.tensor([[1, 2, 3], [4, 5, 6]], device=model.device)
    lengths = torch.tensor([0, 3, 6], dtype=torch.int32, device=model.device)
    rows = PackedRows(ids_NS.view(1, 6), torch.arange(3, device=model.device).repeat(2)[None], lengths, 3)
    try:
        together = body(use_cache=False, **rows.arguments(flash=False))[0].view(2, 3, -1)
        apart = body(input_ids=ids_NS, use_cache=False)[0]
    except Exception:  # code of any architecture: whatever it cannot do, it need not
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return together.shape == apart.shape and torch.allclose(together, apart, rtol=tolerance, atol=tolerance)


def check_packing(model: Any, options: ModelOptions, packs: bool) -> None:
    """Compare what was asked of attention with what this process's GPU can do; log one line where rows will be padded there.

    Args:
        packs: what `can_pack` found, and False where the options switch packing off.

    Raises:
        UsageError: `varlen` was asked for, and the model's layers do not keep packed rows apart.
        OptionError: `varlen` was asked for, and the GPU or the dtype cannot have it.
    """
    text = model.config.get_text_config(decoder=True)
    asked = options.attention == "varlen"
    if asked and not packs:
        raise UsageError(
            f"attention varlen needs packed rows, but layers of {options.model} cannot keep packed rows apart; "
            f"choose {option('attention', 'sdpa')}, which pads rows"
        )
    if not packs or text._attn_implementation != NAME or not torch.cuda.is_available():
        return
    device = torch.device("cuda", torch.cuda.current_device())
    obstacle = varlen_obstacle(text, device, getattr(torch, options.compute_dtype))
    if obstacle and asked:
        raise OptionError("attention", f"varlen is not available: {obstacle}; use sdpa, which pads rows")
    if obstacle:
        log.info(
            f"{options.model}: rows are padded on this GPU, not packed, since torch's variable-length attention is "
            f"not available: {obstacle}"
        )
