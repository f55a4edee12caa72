"""The calls of a weight update to an engine in separate processes, as a sender makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["LEFT_OUT", "SyncClient", "left_out"]

LEFT_OUT = "the role's weights() omitted"
"""Beginning of the receiver's error, which vLLM passes on as text."""

END = "is the first"
"""End of the same: what follows is of vLLM, or of the JSON that a server answers with."""


def left_out(text: str) -> str:
    """Return the receiver's complaint inside an error of vLLM, which has `LEFT_OUT` in it."""
    complaint = text[text.index(LEFT_OUT) :]
    return complaint[: complaint.index(END) + len(END)] if END in complaint else complaint.split("\n")[0]


class SyncClient:
    """Calls that a sender makes, as vLLM's `VLLMWeightSyncClient` has them.

    Args:
        llm: the engine.
        call: waits for a coroutine of the engine.
        version: returns the version of the weights that are sent.
    """

    def __init__(self, llm: Any, call: Callable[[Any], Any], version: Callable[[], str]) -> None:
        self.llm = llm
        self.call = call
        self.version = version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Begin with a sender."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self.call(self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    def start_weight_update(self) -> None:
        """Begin an update."""
        self.call(self.llm.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        """Take weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self.call(self.llm.update_weights(WeightTransferUpdateRequest(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update; tokens carry the role's version from now on."""
        self.call(self.llm.finish_weight_update(weight_version or self.version()))
