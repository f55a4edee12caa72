"""Options of the strategy `deepspeed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_core.errors import OptionError, UsageError, option

__all__ = ["DeepSpeedOptions"]


@dataclass(frozen=True)
class DeepSpeedOptions:
    """Options of DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 2
    """parts that are sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too"""
    offload: Literal["none", "optimizer", "all"] = "none"
    """parts that stay in main memory during training: `optimizer` (states and float32 weights, updated by the CPU;
    stages 1 to 3), or `all` (the sharded weights too; stage 3)"""
    cpu_adam: bool = False
    """update offloaded weights with DeepSpeed's AdamW for CPUs, which compiles at first use"""
    hpz: int | None = None
    """number of ranks, such as those of a node, that together hold one more copy of the weights, so that the backward
    pass gathers inside the node (ZeRO++; stage 3)"""
    leaf_modules: tuple[str, ...] = ()
    """classes of modules whose weights are gathered at once, such as the block of experts of a mixture (stage 3)"""
    sequence: int = 1
    """number of ranks that share each row, for long contexts: each holds a part of the tokens, and attention reads all
    of them"""
    sequence_kind: Literal["ulysses", "ring"] = "ulysses"
    """attention of ranks that share rows: `ulysses` exchanges tokens for heads, and the number of heads limits the ranks;
    `ring` sends keys and values round the ranks, for any number of heads"""
    tensor: int = 1
    """number of ranks that share the matrices of each layer, for wide models: each holds and multiplies a part (AutoTP;
    stages 0 to 2)"""
    bucket: int | None = None
    """number of elements that are reduced or gathered in one call (stages 1 to 3); 50 million by default"""
    overlap: bool | None = None
    """communicate while the backward pass runs (stages 2 and 3); enabled by default"""
    persist: int | None = None
    """size in elements below which weights stay whole on every rank (stage 3); 100,000 by default"""
    config: str = ""
    """JSON file with further DeepSpeed settings; it may set "auto" for, but not contradict, the run's own decisions"""
    show_config: bool = False
    """print the DeepSpeed configuration of each role before it is built"""

    def __post_init__(self) -> None:
        for name, least in (("bucket", 1), ("persist", 1), ("hpz", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        if self.overlap and self.stage < 2:
            raise UsageError(
                f"overlap needs stage 2 or 3, not {self.stage}; lower stages send nothing in the backward pass"
            )
        if self.offload == "optimizer" and self.stage == 0:
            raise OptionError("offload", "optimizer needs stage 1, 2 or 3, not 0, which shards no optimizer state")
        if self.offload == "all" and self.stage < 3:
            raise OptionError(
                "offload", f"all needs stage 3, not {self.stage}, which keeps whole weights on every device"
            )
        if self.cpu_adam and self.offload == "none":
            raise OptionError("cpu_adam", "updates weights in main memory; choose an offload too")
        for name in ("sequence", "tensor"):
            if getattr(self, name) < 1:
                raise OptionError(name, f"must be at least 1, not {getattr(self, name)}")
        if self.tensor > 1 and self.sequence > 1:
            raise OptionError(
                "tensor", f"{self.tensor} does not go together with sequence {self.sequence}; leave one out"
            )
        if self.tensor > 1 and self.stage == 3:
            raise OptionError(
                "tensor",
                f"{self.tensor} needs stage 0, 1 or 2, not 3, which shards every weight already; leave one out",
            )
        if self.sequence == 1 and self.sequence_kind == "ring":
            raise OptionError(
                "sequence_kind", f"ring needs ranks that share rows; set {option('sequence')} to 2 or more"
            )
        if self.bucket is not None and self.stage == 0:
            raise OptionError("bucket", "needs stage 1, 2 or 3, not 0, where DeepSpeed sets the size; leave it out")
        for name in ("hpz", "leaf_modules", "persist"):
            if getattr(self, name) and self.stage < 3:
                raise OptionError(name, f"needs stage 3, which shards weights, not {self.stage}; leave it out")
