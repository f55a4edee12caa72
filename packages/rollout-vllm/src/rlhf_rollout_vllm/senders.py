"""The sending ends of vLLM's weight-transfer interface, in the process that trains.

vLLM's own senders for NCCL and CUDA IPC take the same source and the same client as the one here, so that an engine calls
`send_weights` of whichever it has. Like `receivers`, this module needs vLLM at once; `own_process` imports it late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vllm.distributed.weight_transfer.base import (  # noqa: TID253  see above
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.adapters import BaseWeights
    from rlhf_rollout_vllm.shared_weights import SharedWeights

__all__ = ["RoleWeights", "SharedMemoryInfo", "SharedMemorySender"]


class RoleWeights(WeightSource):  # type: ignore[misc]  # vLLM is not there where types are checked
    """The weights of a role, in the engine's dtype.

    Args:
        dtype: the engine's.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.role: Role | BaseWeights | None = None
        """role whose weights the next update takes"""
        self.bytes = 0
        """bytes of the last iteration"""
        self._metadata: list[ParamMeta] = []

    def raw(self) -> Iterator[tuple[str, Tensor]]:
        """Return names and tensors as the role has them."""
        assert self.role is not None, "there is a role before weights are sent"
        return self.role.weights()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.bytes = 0
        for name, tensor in self.raw():
            sent = tensor.detach().to(self.dtype) if tensor.is_floating_point() else tensor.detach()
            self.bytes += sent.numel() * sent.element_size()
            yield name, sent

    def metadata(self) -> list[ParamMeta]:
        """Return names, dtypes and shapes, found out by the first call, which gathers sharded weights once."""
        if not self._metadata:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata


@dataclass
class SharedMemoryInfo(TrainerInitInfo):  # type: ignore[misc]  # the same
    """Initial arguments of the sender."""

    backend: ClassVar[str] = "rlhf_shared_memory"

    store: SharedWeights
    """destination of the weights"""


class SharedMemorySender(TrainerWeightTransferEngine):  # type: ignore[misc]  # the same
    """Writes weights to shared memory, and sends the engine's processes the place of each tensor."""

    init_info_cls = SharedMemoryInfo
    store: SharedWeights

    @classmethod
    def trainer_init(
        cls, init_info: SharedMemoryInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Let the engine's processes open the memory."""
        sender = cls(client=client, source=source)
        sender.store = init_info.store
        client.init_weight_transfer_engine({"path": init_info.store.path})
        return sender

    def send_weights(self) -> None:
        """Write and announce: three calls for any number of tensors and buckets."""
        self.store.write(self.source.raw())
        self.send_again()

    def send_again(self) -> None:
        """Tell the engine of what was written last."""
        info: dict[str, Any] = {"buckets": self.store.buckets, "sheets": self.store.sheets}
        self.client.start_weight_update()
        self.client.update_weights(info)
        self.client.finish_weight_update()
