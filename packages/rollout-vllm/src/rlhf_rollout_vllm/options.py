"""Options of the rollout engine `vllm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_core.errors import UsageError

__all__ = ["VLLMOptions"]


@dataclass(frozen=True)
class VLLMOptions:
    """Options of sampling with vLLM."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """what the engine computes in; `auto` takes the role's dtype"""
    max_model_len: int = 0
    """longest prompt and completion together, in tokens; 0 takes what the model and the cache allow"""
    max_num_seqs: int = 256
    """completions that are sampled at a time; more wait"""
    kv_cache_gib: float = 0.0
    """size of the key-value cache in GiB; 0 takes what `gpu_memory_utilization` leaves, and 4 on the CPU"""
    gpu_memory_utilization: float = 0.5
    """share of the GPU's memory for the engine, weights and cache, 0 to 1; training shares the device. CPU: not read"""
    enforce_eager: bool | None = None
    """run without compilation and CUDA graphs: slower, quicker to start. By default on the CPU only"""
    enable_prefix_caching: bool = True
    """compute a prompt once for all its completions (and again only after an update)"""
    enable_sleep: bool = False
    """let the engine's weights and cache leave the GPU when it is put to sleep, which no launcher does yet; one sampled role,
    not on the CPU"""
    max_logprob_diff: float = 0.0
    """the run stops if engine and trainer differ by more than this in the mean log-probability of the same tokens, after
    opening or after the first update; 0 takes 0.001 for float32 and 0.05 for 16 bits, `inf` never stops"""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "kv_cache_gib", "max_logprob_diff"):
            if not getattr(self, name) >= 0:  # written so that nan fails
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.max_num_seqs < 1:
            raise UsageError(f"max_num_seqs must be at least 1, not {self.max_num_seqs}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}")
