"""The entry point `vllm.general_plugins`, which vLLM loads in each of its processes.

It registers the receivers, and ends an engine's processes with their trainer.
"""

from __future__ import annotations

import os
import select
import threading

__all__ = ["RECEIVERS", "TRAINER", "register"]

RECEIVERS = {
    "rlhf_in_process": "InProcess",
    "rlhf_shared_memory": "SharedMemory",
    "rlhf_ipc": "Ipc",
    "rlhf_nccl": "Nccl",
}
"""Classes of `receivers` by their names in vLLM."""

TRAINER = "RLHF_VLLM_TRAINER"
"""Environment variable with the number of the process that started the engine's processes."""


def register() -> None:
    """Make the receivers known to vLLM; in a process of an engine's own, also end it when its trainer ends."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for name, kind in RECEIVERS.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, "rlhf_rollout_vllm.receivers", kind)
    trainer = int(os.environ.get(TRAINER, "0"))
    if trainer not in (0, os.getpid()):
        _end_with(trainer)


def _end_with(process: int) -> None:
    """End this process as soon as `process` has ended, however it did; vLLM's would continue."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="rlhf-trainer-watch", daemon=True).start()
