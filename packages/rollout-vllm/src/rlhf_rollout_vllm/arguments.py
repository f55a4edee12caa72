"""The arguments that vLLM's engine is made with, from the options and what the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError, option, run_option
from rlhf_rollout_vllm.kept_tokens import MOST

if TYPE_CHECKING:
    from rlhf_rollout_vllm.options import VLLMOptions

__all__ = ["CPU_CACHE_GIB", "engine_arguments", "engine_gpus", "lora_arguments", "memory_share", "reason_of"]

CPU_CACHE_GIB = 4.0

CPU_SEQUENCES = 256

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for (`vllm.config.lora.MaxLoRARanks`)."""

KEPT_ADAPTERS = 2


def engine_arguments(options: VLLMOptions, model: str, dtype: str, cpu: bool, share: float) -> dict[str, Any]:
    """Return vLLM's engine arguments, but for those of the place where it runs.

    Args:
        options: the provider.
        model: folder or hub name that configuration and tokenizer are read from.
        dtype: what the engine computes in.
        cpu: True if vLLM runs on the CPU.
        share: of the GPU's memory, see `memory_share`.
    """
    cache_gib = options.kv_cache_gib or (CPU_CACHE_GIB if cpu else 0.0)
    return {
        "model": model,
        "dtype": dtype,
        "load_format": "dummy",
        "quantization": options.quantization or None,
        "max_model_len": options.max_model_len or -1,
        "max_num_seqs": options.max_num_seqs or (CPU_SEQUENCES if cpu else None),
        "kv_cache_memory_bytes": int(cache_gib * 2**30) or None,
        "gpu_memory_utilization": share,
        "enforce_eager": cpu if options.enforce_eager is None else options.enforce_eager,
        "enable_prefix_caching": options.enable_prefix_caching,
        "block_size": options.block_size or None,
        "enable_chunked_prefill": False if cpu else None,  # a seed would be rewound, which fails on the CPU
        "enable_sleep_mode": options.enable_sleep and not cpu,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": MOST,
        "worker_extension_cls": "rlhf_rollout_vllm.worker_extension.WorkerExtension",
        "generation_config": "vllm",  # sampling is the run's, not the model's
    }


def lora_arguments(rank: int) -> dict[str, Any]:
    """Return vLLM's engine arguments for adapters that come apart from the weights.

    Two are kept at a time: completions may still be sampled with the last one after an update.

    Args:
        rank: of the adapters; 0 for none.

    Raises:
        OptionError: it is larger than vLLM takes.
    """
    if not rank:
        return {}
    fitting = [each for each in LORA_RANKS if each >= rank]
    if not fitting:
        raise OptionError(
            "lora", f"adapter takes ranks up to {LORA_RANKS[-1]}, not {rank}; pass {option('lora', 'merged')}"
        )
    return {
        "enable_lora": True,
        "max_lora_rank": fitting[0],
        "max_loras": KEPT_ADAPTERS,
        "max_cpu_loras": KEPT_ADAPTERS,
    }


def memory_share(asked: float, free: int, total: int) -> float:
    """Return the share of a device's memory that the engine takes: as asked, or half of what is free.

    Args:
        asked: the option; 0 leaves it to this function.
        free, total: bytes of the device.
    """
    return asked or free / total / 2


def engine_gpus(options: VLLMOptions, environment: Mapping[str, str]) -> list[int] | None:
    """Return the GPUs of an engine in separate processes, by number; None where vLLM takes the first ones.

    An engine is on its trainer's GPU, or for NCCL, which joins no GPU with itself, on those after all trainers' of the machine.

    Args:
        options: the provider.
        environment: has the number of ranks that a launcher started, and the number of this one.

    Raises:
        UsageError: each of several ranks would have an engine on several GPUs.
    """
    size, ranks = options.engine_devices, int(environment.get("LOCAL_WORLD_SIZE", "1"))
    rank = int(environment.get("LOCAL_RANK", "0"))
    if options.transfer == "nccl":
        return list(range(ranks + rank * size, ranks + (rank + 1) * size))
    if ranks > 1 and size > 1:
        raise OptionError(
            options.parallel_sizes,
            f"need a single engine, but each of the {ranks} ranks has one on its GPU; pass "
            f"{run_option('launcher', 'ray')}",
        )
    return [rank] if ranks > 1 else None


def reason_of(error: Exception) -> str:
    """Return the line of an error of vLLM that names the reason."""
    reasons = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in reasons if "validation error" not in line and len(line) > 20), reasons[0])
