"""LoRA (Hu et al. 2022) inside a role's module: which layers are adapted, what is trained, and what the update amounts to.

PEFT puts the adapters into the model's linear layers, so that a saved adapter is an ordinary PEFT folder. The
language-model head adapts itself (`heads.ChunkedHead`): PEFT's layer would compute the logits that must not be held. A
layer's weight is W + (alpha / rank) B A; B begins at zero, so a new adapter changes nothing.

Left out on purpose: other kinds of adapters, and adapters on embeddings and on fused experts, which are no linear layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_core.errors import OptionError, run_option
from rlhf_core.models.heads.modules import ChunkedHead, generator_for
from rlhf_core.models.loading.optional_imports import import_peft

if TYPE_CHECKING:
    from rlhf_core.contract.options import Lora

__all__ = ["Adapters", "Site", "adapt", "linear_layers"]

ADAPTER = "default"
"""PEFT's name of an adapter without a name."""

ALL = "all-linear"


@dataclass(frozen=True)
class Site:
    """One adapted matrix, all by name: strategies may put other objects in the place of a module's parameters."""

    name: str
    """the matrix's Hugging Face name without `.weight`, and that of the layer that adapts it"""
    base: str
    """the name of the matrix in the model"""
    A: str
    """name of the factor (rank, in)"""
    B: str
    """name of the factor (out, rank)"""
    scale: float
    transposed: bool = False
    """True if the matrix is (in, out), as GPT-2's are"""

    def merge(self, base: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return the weight that acts like base and adapter together, in the base's dtype; of whole tensors."""
        update = self.scale * (B.float() @ A.float())
        return (base.float() + (update.t() if self.transposed else update)).to(base.dtype)


@dataclass
class Adapters:
    """The adapters of one model. Layers and parameters are looked up in the model at each use."""

    config: Any
    """PEFT's `LoraConfig`"""
    sites: tuple[Site, ...] = ()
    on: bool = True
    """True if they act"""

    @contextmanager
    def disable(self, model: nn.Module) -> Iterator[None]:
        """Use `model` without its adapters inside the context: the model as it was before training."""
        self._switch(model, False)
        try:
            yield
        finally:
            self._switch(model, True)

    def _switch(self, model: nn.Module, on: bool) -> None:
        self.on = on
        for layer in self._layers(model):
            layer._disable_adapters = not on  # PEFT's `enable_adapters` would also change what is trained

    def _layers(self, model: nn.Module) -> Iterator[Any]:
        """Yield PEFT's layers, and the head if it is adapted."""
        for site in self.sites:
            yield model.get_submodule(site.name)

    @property
    def names(self) -> list[str]:
        """The names of all factors in the model."""
        return [name for site in self.sites for name in (site.A, site.B)]

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return all factors as `model` holds them now."""
        return [model.get_parameter(name) for name in self.names]

    def drop(self, model: nn.Module, active: bool) -> None:
        """Switch the dropout of the adapters."""
        for layer in self._layers(model):
            if not isinstance(layer, ChunkedHead):
                layer.lora_dropout.train(active)

    def save(self, folder: Path, base: str, weights: Mapping[str, Tensor]) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            folder: where.
            base: the model that the adapters belong to.
            weights: whole tensors by their names in the model: all factors, and a classifier's head (`score`) if there is one.
        """
        tensors = {}
        for site in self.sites:
            tensors[f"base_model.model.{site.name}.lora_A.weight"] = weights[site.A]
            tensors[f"base_model.model.{site.name}.lora_B.weight"] = weights[site.B]
        tensors |= {f"base_model.model.{name}": weights[name] for name in weights if name.startswith("score.")}
        self.config.base_model_name_or_path = base
        self.config.inference_mode = True
        self.config.save_pretrained(str(folder))
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapt(model: Any, options: Lora, role: str, seed: str) -> Adapters:
    """Put adapters into `model`, whose weights are frozen; the numbers they begin with depend on `seed` alone.

    Raises:
        UsageError: the targets name no linear layer of the model, or a head that is tied to the embedding.
        MissingPackage: PEFT is not installed.
    """
    peft = import_peft(run_option(f"{role}.lora"))
    head = model.get_output_embeddings()
    targets, on_head = _targets(model, options, role)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM" if head is not None else "SEQ_CLS",
        fan_in_fan_out=any(_is_transposed(layer) for layer in linear_layers(model).values()),
    )
    if targets:
        with torch.random.fork_rng(devices=[]):  # what it draws is drawn again below
            peft.inject_adapter_in_model(config, model, ADAPTER)
    if on_head:
        head.adapt(options.rank, options.alpha)
        config.target_modules = sorted({*targets, _name_of(model, head).rpartition(".")[2]})
    config.modules_to_save = None if head is not None else ["score"]  # before, PEFT would have copied the head
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    adapters = Adapters(config, tuple(_site(name, layer) for name, layer in layers.items()))
    for site in adapters.sites:
        A, B = model.get_parameter(site.A), model.get_parameter(site.B)
        bound = A.shape[1] ** -0.5  # PEFT's own, Kaiming's uniform with a = sqrt(5)
        with torch.no_grad():
            A.data = torch.empty(A.shape).uniform_(-bound, bound, generator=generator_for(f"{seed}/{site.name}"))
            B.data = torch.zeros(B.shape)
    return adapters


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The linear layers of a model by name, but for its heads."""
    from transformers.pytorch_utils import Conv1D

    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and not any(layer is head for head in heads)
    }


def dequantize(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return `whole`, the weight of `parameter`; of one held in 4 bits, the matrix that it stands for."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return whole
    functional: Any = importlib.import_module("bitsandbytes.functional")
    found: Tensor = functional.dequantize_4bit(parameter.data, state)
    return found


def _targets(model: Any, options: Lora, role: str) -> tuple[set[str], bool]:
    """The last parts of the names of the layers to adapt, and whether the language-model head is among them."""
    head = model.get_output_embeddings()
    head_name = _name_of(model, head) if isinstance(head, ChunkedHead) else ""
    names = list(linear_layers(model))
    targets, on_head = set[str](), False
    for wanted in options.targets:
        found = [name for name in names if wanted == ALL or f".{name}".endswith(f".{wanted}")]
        targets |= {name.rpartition(".")[2] if wanted == ALL else wanted for name in found}
        is_head = bool(head_name) and f".{head_name}".endswith(f".{wanted}")
        if not found and not is_head:
            known = sorted({name.rpartition(".")[2] for name in names})
            raise OptionError(
                f"/{role}.lora.targets",
                f"{wanted}: no linear layer of the model has this name; choose among {', '.join(known)}",
            )
        on_head |= is_head
    if on_head and head.weight is model.get_input_embeddings().weight:
        raise OptionError(
            f"/{role}.lora.targets",
            f"{head_name}: the head of this model is tied to its embedding, so an adapter on it would change both; "
            "leave it out",
        )
    return targets, on_head


def _site(name: str, layer: Any) -> Site:
    """Return the names of the matrix that a layer of PEFT's, or the head, adapts."""
    if isinstance(layer, ChunkedHead):
        return Site(name, f"{name}.weight", f"{name}.lora_A", f"{name}.lora_B", layer.update_scale)
    A, B = (f"{name}.{factor}.{ADAPTER}.weight" for factor in ("lora_A", "lora_B"))
    return Site(name, f"{name}.base_layer.weight", A, B, layer.scaling[ADAPTER], layer.fan_in_fan_out)


def _is_transposed(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear)


def _name_of(model: Any, module: nn.Module) -> str:
    names: Iterator[str] = (name for name, each in model.named_modules() if each is module)
    return next(names)
