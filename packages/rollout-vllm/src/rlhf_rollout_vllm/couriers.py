"""Ways of weights from the trainer to an engine in separate processes: shared memory, CUDA IPC, NCCL.

All are vLLM's weight transfer: a sender drives start, update and finish through a client, and a receiver of the same name loads
in every worker. Like `receivers`, this module needs vLLM at once; `own_process` imports it late.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, ClassVar

from vllm.distributed.weight_transfer import WeightTransferTrainerFactory  # noqa: TID253  see above
from vllm.distributed.weight_transfer.base import (  # noqa: TID253  see above
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
)

from rlhf_rollout_vllm.senders import RoleWeights, SharedMemoryInfo, SharedMemorySender
from rlhf_rollout_vllm.shared_weights import SharedWeights

if TYPE_CHECKING:
    import torch

    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.adapters import BaseWeights

__all__ = ["COURIERS", "Courier"]


class Courier:
    """Brings a role's weights.

    Args:
        dtype: the engine's.
        address: of this machine, as the engine reaches it.
    """

    keeps: ClassVar[bool] = False
    """True if weights can be sent again while the role trains"""

    def __init__(self, dtype: torch.dtype, address: str = "127.0.0.1") -> None:
        self.address = address
        self.source = RoleWeights(dtype)
        self.sender: TrainerWeightTransferEngine | None = None

    def info(self, workers: int) -> TrainerInitInfo:
        """Return what vLLM's sender begins with.

        Args:
            workers: processes that load weights.
        """
        raise NotImplementedError

    def join(self, client: VLLMWeightSyncClient, workers: int) -> None:
        """Meet processes that have just started."""
        self.sender = WeightTransferTrainerFactory.trainer_init(self.info(workers), client=client, source=self.source)

    def begin(self, role: Role | BaseWeights) -> None:
        """Take over the role's present weights, as far as they can be taken before the engine is called."""
        self.source.role = role

    def send(self) -> None:
        """Bring the weights of `begin`: three calls of the client, however many tensors there are."""
        assert self.sender is not None, "join comes first"
        self.sender.send_weights()

    @property
    def has_weights(self) -> bool:
        """True after the first `begin`."""
        return self.source.role is not None

    @property
    def bytes(self) -> int:
        """Bytes of the weights that were sent last."""
        return self.source.bytes

    def close(self) -> None:
        """Free what is held; a second call does nothing."""
        if self.sender is not None:
            self.sender.shutdown()
            self.sender = None


class SharedMemory(Courier):
    """Through memory of this machine, which keeps the weights; on the CPU and on GPUs."""

    keeps = True

    def __init__(self, dtype: torch.dtype, address: str = "127.0.0.1") -> None:
        super().__init__(dtype, address)
        self.store = SharedWeights(dtype)

    def info(self, workers: int) -> SharedMemoryInfo:
        """Return the memory."""
        if SharedMemoryInfo.backend not in WeightTransferTrainerFactory._registry:
            WeightTransferTrainerFactory.register_engine(SharedMemoryInfo.backend, SharedMemorySender)
        return SharedMemoryInfo(rank=0, store=self.store)

    def begin(self, role: Role | BaseWeights) -> None:
        """Write the weights; completions may be sampled meanwhile."""
        self.source.role = role
        try:
            self.store.write(self.source.raw())
        finally:
            self.source.role = None

    def send(self) -> None:
        """Tell the engine where they are."""
        assert isinstance(self.sender, SharedMemorySender), "join comes first"
        self.sender.send_again()

    @property
    def has_weights(self) -> bool:
        """True if the memory has weights."""
        return bool(self.store.sheets)

    @property
    def bytes(self) -> int:
        """Bytes of the weights in the memory."""
        return self.store.bytes

    def close(self) -> None:
        """Free the memory."""
        super().close()
        self.store.close()


class Ipc(Courier):
    """Through handles of CUDA memory, for an engine on the GPUs that the trainer computes on. Not run on a GPU yet."""

    def info(self, workers: int) -> TrainerInitInfo:
        """Return vLLM's own description; packed, so that a buffer of bounded size is shared and no whole copy."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=0, packed=True)


class Nccl(Courier):
    """Broadcast over NCCL, for an engine on other GPUs than the trainer's. Not run on a GPU yet."""

    def info(self, workers: int) -> TrainerInitInfo:
        """Return vLLM's own description, with a free port of this machine for the meeting."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as probe:
            probe.bind((self.address, 0))
            port = probe.getsockname()[1]
        return NCCLTrainerInitInfo(rank=0, master_address=self.address, master_port=port, world_size=1 + workers)


COURIERS: dict[str, type[Courier]] = {"shared_memory": SharedMemory, "ipc": Ipc, "nccl": Nccl}
"""Couriers by their option; vLLM's names of their receivers begin with `rlhf_`."""
