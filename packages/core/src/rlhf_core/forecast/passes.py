"""The passes of one role, run on shapes alone, and the bytes and operations that they take on a device with a whole copy."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.memory import ModelSize, RoleMemory
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.errors import UsageError
from rlhf_core.forecast.routing import Routing
from rlhf_core.forecast.tracker import MemoryTracker
from rlhf_core.lazy import torch
from rlhf_core.models.inputs.arrange import Inputs
from rlhf_core.models.lora import linear_layers
from rlhf_core.models.shapes import FUSED, shape_module
from rlhf_core.training.optimizer import make_optimizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.plan import RoleSpec
    from rlhf_core.forecast.workload import Cells
    from rlhf_core.models.module import RoleModule

__all__ = ["Passes", "run_passes"]

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4-bit NormalFloat: the number, and scales that are quantized twice (Dettmers et al. 2023)."""

CACHE_TOKENS = 16
"""Tokens of the pass that finds the bytes of keys and values per token."""


@dataclass(frozen=True)
class Passes:
    """Memory and operations of a role on a device that holds a whole copy of it."""

    size: ModelSize
    memory: RoleMemory
    graph: int
    """bytes that a training pass over one micro-batch keeps from forward to backward"""
    matrix: int
    """numbers of the body's matrices that a token is multiplied with"""
    head: int
    """numbers of the language-model head, which a completion token is multiplied with"""
    attention: int
    """width of all heads' queries, over all layers"""
    read_tokens: int
    """tokens of the pass without gradient that `memory.inference` is about"""
    narrowed: int = 0
    """bytes of linear layers' weights in the role's compute dtype, if they are held in a wider one"""
    note: str = ""
    """parts that could not be counted; empty if everything was"""


def run_passes(spec: RoleSpec, chunk: int, train: Cells | None, read: Cells, device: str, narrow: bool) -> Passes:
    """Return what the role `spec` takes.

    Args:
        spec: the role.
        chunk: completion tokens whose logits are held at a time.
        train: micro-batches of an optimizer step; None for a frozen role.
        read: micro-batches of a pass without gradient.
        device: `cpu` or `cuda`, which hold different numbers of logits at a time.
        narrow: the strategy trains weights in the dtype that the role computes in.

    Raises:
        UsageError: the model cannot be read, or its passes need numbers and not shapes alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    most = 0 if device == "cpu" else 2**62
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = shape_module(mode, spec, chunk, most, narrow)
    with _explain(spec), mode, Routing() as routing, MemoryTracker(module) as tracker:
        size = _size(module, spec)
        narrowed = _narrowed_bytes(module)
        memory = RoleMemory(weights=_weight_bytes(module, spec), inference=_inference(module, spec, read, tracker))
        graph, note = 0, ""
        if train is not None:
            memory, graph = _training(module, spec, train, tracker, memory, narrow)
            if narrow:
                _widen(module)
            memory, note = _update(module, spec, tracker, memory)
    matrix, head, attention = _operations(module, size, routing.chosen)
    return Passes(size, memory, graph, matrix, head, attention, read.tokens, narrowed, note)


@contextmanager
def _explain(spec: RoleSpec) -> Iterator[None]:
    """Turn what a model's own code raises where it asks a shape for numbers into one line."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UsageError(
            f"the {spec.name} cannot be planned, since the computation of {spec.options.model} depends on values, "
            f"not only on shapes ({type(error).__name__}: {error})"
        ) from error


def _training(
    module: RoleModule, spec: RoleSpec, cells: Cells, tracker: MemoryTracker, memory: RoleMemory, narrow: bool
) -> tuple[RoleMemory, int]:
    """Run the forward and backward pass of a micro-batch, and of a second one where there are several."""
    names = _names(spec)
    tracker.watch_gradients(module)
    graph = overlap = activations = 0
    for number in range(min(2, cells.rounds)):
        tracker.restart()
        before, gradients = tracker.live, tracker.gradients
        outputs = _forward(module, cells, names, narrow)
        graph = tracker.live - before
        loss = sum((values.float().sum() for values in outputs.values()), torch.zeros(()))
        del outputs
        loss.backward()
        del loss
        activations = tracker.peak_besides - (before - gradients)
        if number:  # gradients are there all the time, and new ones are added to them
            activations, overlap = tracker.peak - before, 0
        else:
            overlap = max(0, tracker.gradients + activations - (tracker.peak - before))
    trained = sum(each.numel() * each.element_size() for each in module.parameters() if each.requires_grad)
    return replace(memory, gradients=trained, activations=activations, overlap=overlap), graph


def _widen(module: RoleModule) -> None:
    """Give what is trained float32 numbers: the copies that a strategy with narrow weights updates."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = None
            parameter.data = parameter.data.float()


def _update(module: RoleModule, spec: RoleSpec, tracker: MemoryTracker, memory: RoleMemory) -> tuple[RoleMemory, str]:
    """Run two steps of the role's optimizer: the first makes its state, the second shows what else a step takes."""
    options = spec.options
    assert isinstance(options, TrainedOptions)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    average = 4 * sum(each.numel() for each in trained) if module.average is not None else 0
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gc.collect()  # what earlier passes left in cycles would be freed meanwhile
    before, temporary = tracker.live, 0
    try:
        if options.optim.closure or options.optim.observes:
            raise RuntimeError("it reads more than gradients")
        optimizer = make_optimizer(module, options.optim, 2)
        for _ in range(2):
            tracker.restart()
            held = tracker.live
            torch.nn.utils.clip_grad_norm_(trained, options.optim.max_grad_norm or float("inf"))
            optimizer.step()
            temporary = tracker.peak - held
    except RuntimeError as error:  # of any optimizer, where it asks for numbers
        state = 8 * sum(each.numel() for each in trained)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        note = f"the state of {type(options.optim).__name__} is assumed to be two numbers per weight ({reason})"
        return replace(memory, optimizer=state + average), note
    return replace(memory, optimizer=tracker.live - before + average, update=temporary), ""


def _inference(module: RoleModule, spec: RoleSpec, cells: Cells, tracker: MemoryTracker) -> int:
    """Run a forward pass without gradient; return the most that it holds in addition to the weights."""
    tracker.restart()
    before = tracker.live
    with torch.inference_mode():
        _forward(module, cells, frozenset(name for name in spec.outputs if "." not in name), narrow=False)
    return tracker.peak - before


def _forward(module: RoleModule, cells: Cells, names: frozenset[str], narrow: bool) -> Mapping[str, Tensor]:
    """Run a micro-batch through a role's module, under autocast where weights are wider than what it computes in."""
    wide = any(parameter.dtype != module.compute_dtype for parameter in module.parameters())
    mixed = not narrow and wide and module.compute_dtype != torch.float32
    with torch.autocast("cpu", module.compute_dtype) if mixed else nullcontext():
        outputs: dict[str, Tensor] = module(_inputs(module, cells), names)
    return outputs


def _names(spec: RoleSpec) -> frozenset[str]:
    """Return the outputs that a role's losses differentiate; those that compare two roles stand for log-probabilities."""
    asked = frozenset[str]().union(*(term.outputs for _, term in spec.terms))
    return frozenset("logprobs_NT" if "." in name else name for name in asked)


def _inputs(module: RoleModule, cells: Cells) -> Inputs:
    """Return rows of the lengths of `cells`: end to end if attention keeps rows apart."""
    N, L, T = cells.rows, cells.prompt, cells.completion
    text = module.model.config.get_text_config(decoder=True)
    shape = (1, N * (L + T)) if text._attn_implementation == FUSED else (N, L + T)
    return Inputs(
        ids_NS=torch.zeros(shape, dtype=torch.long),
        states_M=torch.zeros(N * T, dtype=torch.long),
        slots_M=torch.zeros(N * T, dtype=torch.long),
        targets_M=torch.zeros(N * T, dtype=torch.long),
        last_N=torch.zeros(N, dtype=torch.long),
        tokens_NT=torch.zeros(N, T, dtype=torch.long),
    )


def _weight_bytes(module: RoleModule, spec: RoleSpec) -> int:
    """Return the bytes of weights and buffers; those of a moving average belong to the optimizer."""
    buffers: int = sum(each.numel() * each.element_size() for each in module.model.buffers())
    weights: int = sum(each.numel() * each.element_size() for each in module.parameters())
    if spec.options.quantize != "none":
        for layer in linear_layers(module.model).values():
            weight: Any = layer.weight
            if not weight.requires_grad:
                weights += int(weight.numel() * (NF4 - weight.element_size()))
    return weights + buffers


def _narrowed_bytes(module: RoleModule) -> int:
    """Return the bytes of copies of linear layers' wider weights in the dtype that the role computes in."""
    layers = [part for part in module.model.modules() if isinstance(part, torch.nn.Linear)]
    held = [each for layer in layers for each in layer.parameters(recurse=False) if each.is_floating_point()]
    width = torch.empty(0, dtype=module.compute_dtype).element_size()
    return sum(width * each.numel() for each in held if each.element_size() > width)


def _size(module: RoleModule, spec: RoleSpec) -> ModelSize:
    """Return the numbers of a module."""
    parameters = list(module.parameters())
    layers = list(_layers(module.model))
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    total = sum(parameter.numel() for parameter in parameters)
    head = module.model.get_output_embeddings() if spec.needs_language_head else None
    return ModelSize(
        parameters=total,
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        layer=max(sizes, default=0),
        root=total - sum(sizes),
        layers=len(layers),
        vocabulary=len(head.weight) if head is not None else 0,
        compute_bytes=torch.empty(0, dtype=module.compute_dtype).element_size(),
        cache_bytes=_cache_bytes(module) if spec.sampled else 0,
    )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists of modules: a transformer's layers, not the experts inside them."""
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _layers(child)


def _cache_bytes(module: RoleModule) -> int:
    """Return the bytes of one token's keys and values, found from a pass that keeps them."""
    ids = torch.zeros(1, CACHE_TOKENS, dtype=torch.long)
    with torch.inference_mode():
        cache: Any = module.model.base_model(input_ids=ids, use_cache=True).past_key_values
    held = [each for layer in cache.layers for each in vars(layer).values() if isinstance(each, torch.Tensor)]
    numbers: int = sum(each.numel() for each in held if each.dim() == 4)
    return numbers * int(torch.empty(0, dtype=module.compute_dtype).element_size()) // CACHE_TOKENS


def _operations(module: RoleModule, size: ModelSize, chosen: Mapping[int, int]) -> tuple[int, int, int]:
    """Return the numbers that a token is multiplied with in the body and in the head, and the width of all queries."""
    text = module.model.config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    matrices: list[Any] = list(linear_layers(module.model).values())
    body = sum(prod(layer.weight.shape) for layer in matrices) + _expert_operations(module, chosen)
    return body, size.vocabulary * text.hidden_size, width * size.layers


def _expert_operations(module: nn.Module, chosen: Mapping[int, int]) -> int:
    """Return the numbers of routers, and of the experts that a token is sent to: matrices that are in no linear layer.

    `chosen` is how many entries a token chose, by the number of entries it chose from; without a choice, all are multiplied.
    """
    numbers = 0
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        experts = [each for each in own if each.dim() == 3]
        numbers += sum(each.numel() * chosen.get(len(each), len(each)) // len(each) for each in experts)
        if not experts and not isinstance(part, (torch.nn.Linear, torch.nn.Embedding)):
            numbers += sum(each.numel() for each in own if each.dim() == 2 and len(each) in chosen)
    return numbers
