"""The module of a role as shapes alone: no weights are read or held, so that a 70B model can be planned on a laptop.

A model is made from its config on the meta device, and its parameters then become fake tensors: they have shapes, dtypes, a
device and storages of a size, and no numbers. It takes no memory, and its forward and backward passes take no arithmetic. What
autograd keeps, what autocast converts, and when memory is freed are as in a real pass, so that they can be counted.

Attention is replaced by a function that keeps what fused kernels keep: queries, keys, values, the output and a log-sum-exp per
query (Dao et al. 2022). It needs no mask and knows no rows, so that packed rows are one long row. `eager` stays as it is.

Left out on purpose: the vision part of a forward pass, and 4-bit storage, whose bytes a caller counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_core.contract.options import TrainedOptions
from rlhf_core.models.build import add_adapters, check_new_tokens, prepare_training
from rlhf_core.models.heads.modules import SCALAR, ChunkedHead, ScalarHead, head_options
from rlhf_core.models.inputs.vision import is_vision
from rlhf_core.models.loading import tiny
from rlhf_core.models.loading.adapters import read_base_model
from rlhf_core.models.loading.architecture import choose_attention, name_body
from rlhf_core.models.loading.hub import resolve_name
from rlhf_core.models.loading.load import fit_embedding, has_scorer
from rlhf_core.models.loading.transformers_calls import read_config
from rlhf_core.models.module import RoleModule

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rlhf_core.contract.options import ModelOptions
    from rlhf_core.contract.plan import RoleSpec

__all__ = ["FUSED", "shape_module"]

FUSED = "rlhf_shapes"
"""The attention function below, among transformers' implementations."""


def shape_module(mode: FakeTensorMode, spec: RoleSpec, chunk: int, logits: int, narrow: bool = False) -> RoleModule:
    """Return the module of a role without numbers, for passes inside a `FakeTensorMode`.

    Args:
        mode: the `FakeTensorMode`; not active yet.
        spec: the role.
        chunk: completion tokens whose logits are held at a time; 0 holds all.
        logits: most additional logits held at a time (`ChunkedHead.most_logits`).
        narrow: hold trained weights in the dtype that the role computes in, not in float32.

    Raises:
        UsageError: there is no such model, or its config cannot be read.
    """
    with torch.device("meta"):
        module = _meta_module(spec, chunk, logits, narrow)
    with mode:
        _make_fake(module)
    return module


def _meta_module(spec: RoleSpec, chunk: int, logits: int, narrow: bool) -> RoleModule:
    """Return the module of a role on the meta device."""
    options = spec.options
    adapted = bool(spec.trained and options.lora.rank)  # type: ignore[attr-defined]  # what is trained has them
    wide = spec.trained and not adapted and not narrow
    dtype: torch.dtype = torch.float32 if wide else getattr(torch, options.compute_dtype)
    scalars = [name for output, name in SCALAR.items() if output in spec.outputs]
    classifier = bool(scalars) and not spec.needs_language_head and has_scorer(options.model, options)
    model: Any = _model(options.model, options, dtype, classifier)
    check_new_tokens(model, spec)
    hidden = model.config.get_text_config().hidden_size
    if classifier:
        model.score = ScalarHead(model.score)
    heads: dict[str, nn.Module] = {name: ScalarHead.new(hidden, dtype) for name in scalars[int(classifier) :]}
    for name, output in spec.providers.items():
        head = output.head(hidden)
        if head is not None:
            heads[name] = head
    if spec.needs_language_head:
        head = ChunkedHead(model.get_output_embeddings(), chunk, spec.temperature, **head_options(model.config))
        head.most_logits = logits
        model.set_output_embeddings(head)
    adapters = add_adapters(model, spec, 0) if adapted else None
    module = RoleModule(model, heads, getattr(torch, options.compute_dtype), adapters, outputs=spec.providers).eval()
    prepare_training(module, replace(spec, options=_without_files(options)))
    return module


def _make_fake(module: nn.Module) -> None:
    """Replace all parameters and buffers of `module` by fake tensors on the CPU; what is shared stays shared."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            if parameter is not None:
                part._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _without_files(options: ModelOptions) -> ModelOptions:
    """`options` without what reads or writes files."""
    return replace(options, features="") if isinstance(options, TrainedOptions) else options


def _model(name: str, options: ModelOptions, dtype: torch.dtype, classifier: bool) -> Any:
    """The Hugging Face model `name` from its config."""
    from transformers import (
        AttentionInterface,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    AttentionInterface.register(FUSED, fused_attention)
    source = resolve_name(name)
    if source.kind == "adapter":
        return _model(read_base_model(Path(source.location)), options, dtype, classifier)
    labels = {"num_labels": 1} if classifier else {}
    if source.kind == "tiny":
        config: Any = tiny.parse(name).config(**labels)
    else:
        config = read_config(name, source, options, **labels)
    auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if not classifier and is_vision(config):
        auto = AutoModelForImageTextToText
    model = auto.from_config(
        config,
        dtype=dtype,
        attn_implementation=_attention(choose_attention(name, config, options) or "sdpa"),
        trust_remote_code=options.trust_remote_code,
    )
    name_body(model)
    if options.add_tokens or source.kind == "folder":  # a tokenizer of the hub is not downloaded for a forecast
        fit_embedding(name, source, model, options)
    return model


def _attention(chosen: str) -> str:
    return chosen if chosen == "eager" else FUSED


class _FusedAttention(torch.autograd.Function):
    """The memory of fused attention, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(
    module: nn.Module,  # noqa: ARG001  transformers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  all rows are whole
    **kwargs: Any,  # noqa: ARG001  nothing of it changes a shape
) -> tuple[Tensor, None]:
    """Take what transformers calls attention with, (batch, heads, length, dim), to (batch, length, heads, dim)."""
    output: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None
