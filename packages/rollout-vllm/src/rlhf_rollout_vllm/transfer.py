"""The receiving end of vLLM's weight-transfer interface for a trainer in the same process.

vLLM brings transfers between processes (NCCL, CUDA IPC); CUDA IPC cannot open what its own process shares, and the CPU has
neither. Here the trainer's tensors are handed over as they are, one after the other: vLLM converts, fuses and packs each
layer when it is complete and lets go of it, so that no second copy of the model comes into being, and what CUDA graphs
point to stays in place.

vLLM imports this module by name (`session` registers it); nothing else may, since it needs vLLM at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import (  # noqa: TID253  see above
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: TID253  see above
from vllm.model_executor.model_loader.reload import (  # noqa: TID253  see above
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rlhf_core.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["InProcess"]


@dataclass
class Nothing(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not there where types are checked
    """There is nothing to agree on beforehand."""


@dataclass
class Weights(WeightTransferUpdateInfo):  # type: ignore[misc]  # the same
    """What the trainer hands over."""

    weights: Iterator[tuple[str, Tensor]]
    """full tensors under their Hugging Face names"""


class InProcess(WeightTransferEngine):  # type: ignore[misc]  # the same
    """Loads tensors of this process into the engine's model."""

    init_info_cls = Nothing
    update_info_cls = Weights

    def __init__(self, *of_vllm: Any) -> None:
        super().__init__(*of_vllm)
        self.expected = {name for name, _ in self.model.named_parameters()}  # tied ones once
        """what an update has to bring, by vLLM's names"""

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Put the model's layers back to how a checkpoint is loaded into them."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Weights) -> None:
        """Load all tensors, a layer at a time.

        Raises:
            ContractError: some were left out.
        """
        loaded = self.model.load_weights(update_info.weights)
        self.loaded = loaded or set()
        left_out = set() if loaded is None else self.expected - loaded  # a few models do not say what they loaded
        if left_out:
            raise ContractError(
                f"the role's weights() left out {len(left_out)} of the model's tensors, vLLM's {min(left_out)!r} first"
            )

    def finish_weight_update(self) -> None:
        """Put the layers back to how they run."""
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
