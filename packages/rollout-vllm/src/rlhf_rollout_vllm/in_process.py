"""vLLM in the process that trains: weights are read from the trainer's tensors as they are."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.errors import OptionError, UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.device_memory import free_bytes
from rlhf_rollout_vllm.arguments import engine_arguments, lora_arguments, memory_share, reason_of
from rlhf_rollout_vllm.install import import_vllm
from rlhf_rollout_vllm.parameters import sampling_params
from rlhf_rollout_vllm.process_state import preserve_process_state
from rlhf_rollout_vllm.sleeping import PARTS, parts_of, tags_of
from rlhf_rollout_vllm.vllm_plugin import register

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.adapters import Adapter, BaseWeights
    from rlhf_rollout_vllm.options import VLLMOptions

__all__ = ["InProcess"]

TRANSFER = "rlhf_in_process"
"""Name of `receivers.InProcess` in vLLM."""


class InProcess:
    """vLLM in this process.

    Args:
        options: the provider.
        model: folder or hub name that configuration and tokenizer are read from.
        dtype: what the engine computes in.
        trust_remote_code: run code that comes with the model.
        lora_rank: of the adapters that come apart from the weights; 0 if none do.
    """

    def __init__(
        self, options: VLLMOptions, model: str, dtype: str, trust_remote_code: bool, lora_rank: int = 0
    ) -> None:
        self.vllm = import_vllm()
        self.options = options
        self._asleep: frozenset[str] = frozenset()
        """parts whose memory is given back"""
        self.has_weights = False
        """True if a role's weights are there, on the device or in main memory"""
        _groups.prepare()
        with preserve_process_state():
            self.llm = self._open(model, dtype, trust_remote_code, lora_rank)
        _groups.acquire()

    def _open(self, model: str, dtype: str, trust_remote_code: bool, lora_rank: int = 0) -> Any:
        """vLLM's engine, its weights still arbitrary.

        Raises:
            UsageError: vLLM cannot run the model, or not with these options.
        """
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        register()
        cpu = current_platform.is_cpu()
        self._sleeps = self.options.enable_sleep and not cpu
        if self._sleeps and _groups.users:
            raise OptionError(
                "enable_sleep",
                "works only in runs that sample one role, since vLLM can put one engine per process to sleep; "
                "leave it out",
            )
        free, total = (1, 1) if cpu else torch.cuda.mem_get_info()
        share = memory_share(self.options.gpu_memory_utilization, free, total)
        try:
            llm = self.vllm.LLM(
                **engine_arguments(self.options, model, dtype, cpu, share),
                **lora_arguments(lora_rank),
                trust_remote_code=trust_remote_code,
                weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
                distributed_executor_backend=None if cpu else _external_launcher(),
            )
        except ValueError as error:
            raise UsageError(f"vLLM cannot start with this model and these options: {reason_of(error)}") from error
        (kind,) = llm.apply_model(_class_name)
        if kind.startswith("Transformers"):
            raise UsageError(
                f"vLLM does not implement {llm.model_config.architecture}, and the transformers implementation that "
                f"it uses instead would change the model that this process trains; use {run_option('rollout', 'hf')}"
            )
        return llm

    @property
    def model_config(self) -> Any:
        """vLLM's description of the model."""
        return self.llm.llm_engine.model_config

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        adapter: Adapter | None = None,
    ) -> list[Any]:
        """Return vLLM's completion of each prompt, in order."""
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        with preserve_process_state():
            answers = self.llm.generate(
                asked,
                [sampling_params(each) for each in parameters],
                use_tqdm=False,
                lora_request=adapter.request() if adapter is not None else None,
            )
        return [answer.outputs[0] for answer in answers]

    def checksums(self) -> list[dict[int, int]]:
        """Return the checksum of each layer's weights; none for quantized ones, which are others than the trainer's."""
        return (
            [dict(pairs) for pairs in self.llm.collective_rpc("rlhf_checksums")]
            if not self.options.quantization
            else []
        )

    def take(self, role: Role | BaseWeights) -> Mapping[str, float]:
        """Take the role's weights: a fixed number of calls, however many tensors there are.

        Returns:
            `sync/bytes`, `sync/seconds`, `sync/calls`.
        """
        started = time.perf_counter()
        self.wake("weights")  # asleep, it has no memory for them
        weights = _CountedWeights(role.weights())
        with torch.no_grad():
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"weights": weights}})
            self.llm.finish_weight_update(str(role.version))
            self.llm.reset_prefix_cache()
        self.has_weights = True
        return {
            "sync/bytes": float(weights.bytes),
            "sync/seconds": time.perf_counter() - started,
            "sync/calls": 4.0,
        }

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give device memory back; returns its bytes. Level 2 drops the weights, which `take` then brings."""
        if not self._sleeps or self._asleep == PARTS:
            return 0
        before = free_bytes()
        self.llm.sleep(level=level)
        self._asleep = PARTS
        self.has_weights = self.has_weights and level == 1
        return free_bytes() - before

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again; returns its bytes."""
        woken = self._asleep & parts_of(part)
        if not woken:
            return 0
        before = free_bytes()
        self.llm.wake_up(tags=tags_of(woken))
        self._asleep -= woken
        return before - free_bytes()

    def close(self) -> None:
        """Free everything; the process groups too, if no other engine of the process is open."""
        client = self.llm.llm_engine.engine_core
        client._finalizer.detach()  # it would destroy the groups even while in use, the trainer's too
        client.engine_core.model_executor.shutdown()
        client.engine_core.scheduler.shutdown()
        del self.llm, client
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _groups.release()


def _external_launcher() -> str | None:
    """vLLM's name for ranks that a launcher started, each with its own engine, which then takes its rank's GPU, not the
    first one."""
    return "external_launcher" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


class _ProcessGroups:
    """Return vLLM's process groups. vLLM keeps them in globals, so that all engines of a process share them."""

    def __init__(self) -> None:
        self.users = 0
        """engines that are open in this process"""
        self._own_default = False
        """the default process group is vLLM's too"""

    def prepare(self) -> None:
        """Before an engine opens: remember whether vLLM will make the default process group."""
        if not self.users:
            self._own_default = not torch.distributed.is_initialized()

    def acquire(self) -> None:
        """Count an engine that has opened."""
        self.users += 1

    def release(self) -> None:
        """After an engine has closed: destroy the groups if it was the last one; the default one only if it is vLLM's."""
        self.users -= 1
        if self.users:
            return
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        if self._own_default:
            destroy_distributed_environment()


_groups = _ProcessGroups()


class _CountedWeights:
    """The weights as they pass, and how many bytes they were."""

    def __init__(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.weights = weights
        self.bytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor


def _class_name(model: object) -> str:
    return type(model).__name__
