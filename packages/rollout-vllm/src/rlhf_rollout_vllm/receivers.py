"""The receiving ends of vLLM's weight-transfer interface: loading weights into the engine's model, by the way they come.

vLLM converts, fuses and packs each layer when it is complete and lets go of it, so that no second copy of the model comes into
being, and what CUDA graphs point to stays in place. Tensors that were left out are named.

vLLM imports this module by name (`vllm_plugin` registers its classes); nothing else may, since it needs vLLM at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import (  # noqa: TID253  see above
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine  # noqa: TID253  see above
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine  # noqa: TID253  see above
from vllm.lora.layers import BaseLayerWithLoRA  # noqa: TID253  see above
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: TID253  see above
from vllm.model_executor.model_loader.reload import (  # noqa: TID253  see above
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rlhf_core.errors import ContractError
from rlhf_rollout_vllm.shared_weights import read_sheet

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["InProcess", "Ipc", "Nccl", "SharedMemory"]


@dataclass
class Nothing(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not there where types are checked
    """There is nothing to agree on beforehand."""


@dataclass
class Weights(WeightTransferUpdateInfo):  # type: ignore[misc]  # the same
    """Weights that the trainer sends."""

    weights: Iterator[tuple[str, Tensor]]
    """full tensors under their Hugging Face names"""


def check_complete(expected: set[str], loaded: set[str]) -> None:
    """Check that all tensors were loaded.

    Raises:
        ContractError: some were left out.
    """
    left_out = expected - loaded
    if left_out:
        raise ContractError(
            f"the role's weights() omitted {len(left_out)} of the model's tensors; vLLM's {min(left_out)!r} is the "
            "first"
        )


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Put layers in the place of vLLM's layers with adapters around them, so that names are those of a checkpoint."""
    places = []
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, BaseLayerWithLoRA):
            parent, _, own = name.rpartition(".")
            places.append((model.get_submodule(parent), own, layer))
    for module, own, layer in places:
        setattr(module, own, layer.base_layer)
    try:
        yield
    finally:
        for module, own, layer in places:
            setattr(module, own, layer)


class LayerLoader(WeightTransferEngine):  # type: ignore[misc]  # the same
    """Loads full tensors into the engine's model, a layer at a time."""

    def __init__(self, *of_vllm: Any) -> None:
        super().__init__(*of_vllm)
        with without_adapters(self.model):
            self.expected = {name for name, _ in self.model.named_parameters()}  # tied ones once
        """parameters that an update has to bring, by vLLM's names"""
        self.loaded: set[str] = set()

    def start_weight_update(self) -> None:
        """Put the model's layers back to how a checkpoint is loaded into them."""
        with without_adapters(self.model):
            initialize_layerwise_reload(self.model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load all tensors.

        Raises:
            ContractError: some were left out.
        """
        with without_adapters(self.model):
            loaded = self.model.load_weights(weights)
        self.loaded = loaded or set()
        if loaded is not None:  # a few models do not report what they loaded
            check_complete(self.expected, loaded)

    def finish_weight_update(self) -> None:
        """Put the layers back to how they run."""
        with without_adapters(self.model):
            finalize_layerwise_reload(self.model, self.model_config)
            self._repack_tied()

    def _repack_tied(self) -> None:
        """Pack heads again that are tied to an embedding.

        Nothing is loaded into them, so that vLLM 0.32 leaves the copy that was packed for the CPU's matrix product as it was.
        On other devices nothing is packed, and this does nothing.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, VocabParallelEmbedding) and f"{name}.weight" not in self.loaded:
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held."""


class InProcess(LayerLoader):
    """Takes tensors of this process as they are.

    vLLM brings transfers between processes; CUDA IPC cannot open what its own process shares, and the CPU has neither.
    """

    init_info_cls = Nothing
    update_info_cls = Weights

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to do."""

    def receive_weights(self, update_info: Weights) -> None:
        """Load all tensors, a layer at a time."""
        self.load(update_info.weights)


@dataclass
class SharedFile(WeightTransferInitInfo):  # type: ignore[misc]  # the same
    """The memory that the trainer writes weights to."""

    path: str


@dataclass
class Sheets(WeightTransferUpdateInfo):  # type: ignore[misc]  # the same
    """Position of each tensor; see `shared_weights`."""

    buckets: list[list[int]]
    sheets: list[list[Any]]


class SharedMemory(LayerLoader):
    """Reads tensors from memory that the trainer's process shares; any number of processes may."""

    init_info_cls = SharedFile
    update_info_cls = Sheets

    def __init__(self, *of_vllm: Any) -> None:
        super().__init__(*of_vllm)
        self.file: int | None = None
        self.buckets: dict[int, mmap] = {}
        """mapped memory by its offset"""

    def init_transfer_engine(self, init_info: SharedFile) -> None:
        """Open the memory. It has no name, so that it goes away with the last process that has it open."""
        self.shutdown()  # a server outlives its trainers
        self.file = os.open(init_info.path, os.O_RDWR)

    def receive_weights(self, update_info: Sheets) -> None:
        """Load all tensors, a layer at a time."""
        assert self.file is not None
        for offset, size in update_info.buckets:
            if offset not in self.buckets:
                self.buckets[offset] = mmap(self.file, size, offset=offset)
        self.load(read_sheet(self.buckets, sheet) for sheet in update_info.sheets)

    def shutdown(self) -> None:
        """Close the memory."""
        self.buckets.clear()
        if self.file is not None:
            os.close(self.file)
            self.file = None


class Complete:
    """Names tensors that were left out, for a receiver of vLLM that loads them in parts."""

    model: Any
    expected: set[str]

    def __init__(self, *of_vllm: Any) -> None:
        super().__init__(*of_vllm)
        self.expected = {name for name, _ in self.model.named_parameters()}
        self.loaded: set[str] = set()

    def start_weight_update(self) -> None:
        """Begin to note what is loaded."""
        self.loaded.clear()
        super().start_weight_update()  # type: ignore[misc]  # of the receiver that this is mixed into

    def receive_weights(self, update_info: Any) -> None:
        """Load a part."""
        model = self.model
        self.model = _NotedModel(model, self.loaded)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]  # the same
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        """Check that all is there, and put the layers back to how they run."""
        check_complete(self.expected, self.loaded)
        super().finish_weight_update()  # type: ignore[misc]  # the same


class _NotedModel:
    """A model that notes what is loaded into it."""

    def __init__(self, model: Any, loaded: set[str]) -> None:
        self._model, self._loaded = model, loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Load tensors; a model that does not report what it loaded counts as complete."""
        loaded: set[str] | None = self._model.load_weights(weights)
        self._loaded |= {name for name, _ in self._model.named_parameters()} if loaded is None else loaded
        return loaded


class Ipc(Complete, IPCWeightTransferEngine):  # type: ignore[misc]  # the same
    """vLLM's receiver of CUDA IPC. Not run on a GPU yet."""


class Nccl(Complete, NCCLWeightTransferEngine):  # type: ignore[misc]  # the same
    """vLLM's receiver of NCCL broadcasts. Not run on a GPU yet."""
