"""vLLM in separate processes on this machine: an engine core and its workers, behind vLLM's `AsyncLLM`.

Weights come by a courier (`couriers`). Shared memory keeps them, so that processes that died are started again with the
same ones, whatever the trainer does meanwhile. Unanswered requests are repeated: completions follow from their seeds.
Weights may arrive while completions are sampled, which then continue with their cache; every token carries the version that
sampled it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhf_core.errors import ContractError, OptionError, RunStopped, UsageError, option, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.device_memory import free_bytes
from rlhf_core.util.messages import log
from rlhf_rollout_vllm.arguments import engine_arguments, engine_gpus, lora_arguments, memory_share, reason_of
from rlhf_rollout_vllm.asking import ask, destroy_context, gather
from rlhf_rollout_vllm.install import check_entry_point, import_vllm
from rlhf_rollout_vllm.loop_thread import LoopThread
from rlhf_rollout_vllm.parameters import sampling_params
from rlhf_rollout_vllm.process_state import preserve_process_state, quiet_children, without_main_script
from rlhf_rollout_vllm.process_tree import kill_all, process_tree
from rlhf_rollout_vllm.sleeping import PARTS, parts_of, tags_of
from rlhf_rollout_vllm.sync_client import LEFT_OUT, SyncClient, left_out
from rlhf_rollout_vllm.vllm_plugin import TRAINER

if TYPE_CHECKING:
    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.adapters import Adapter, BaseWeights
    from rlhf_rollout_vllm.options import VLLMOptions

__all__ = ["OwnProcess"]

Result = TypeVar("Result")

CLOSE_SECONDS = 10.0
"""Deadline for processes that were killed."""


class OwnProcess:
    """vLLM in separate processes.

    Args:
        options: the provider.
        describe: writes configuration and tokenizer to a folder, and returns where vLLM finds them.
        dtype: what the engine computes in.
        trust_remote_code: run code that comes with the model.
        lora_rank: of the adapters that come apart from the weights; 0 if none do.
    """

    def __init__(
        self,
        options: VLLMOptions,
        describe: Callable[[str], str],
        dtype: str,
        trust_remote_code: bool,
        lora_rank: int = 0,
    ) -> None:
        import_vllm()
        check_entry_point()
        from rlhf_rollout_vllm.couriers import COURIERS

        self.options, self.dtype, self.trust_remote_code = options, dtype, trust_remote_code
        self.lora_rank = lora_rank
        self.describe = describe
        self.restarted = 0
        """deaths so far after which the processes were started again"""
        self.version = ""
        """version of the weights in the store"""
        if options.transfer != "shared_memory" and not torch.cuda.is_available():
            raise OptionError("transfer", f"{options.transfer} needs a GPU, but there is none; leave it out")
        self.courier = COURIERS[options.transfer](getattr(torch, dtype))
        self.loop = LoopThread()
        self._life = threading.RLock()
        """held while weights are taken and while processes are started"""
        self._asleep: frozenset[str] = frozenset()
        """parts whose memory is given back"""
        self._counting = threading.Lock()
        self._waiting = 0
        """requests that are not answered yet"""
        self._asked = 0
        self.llm: Any = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def model_config(self) -> Any:
        """vLLM's description of the model."""
        return self.llm.model_config

    @property
    def processes(self) -> list[int]:
        """Numbers of the engine's processes."""
        manager = self.llm.engine_core.resources.engine_manager if self.llm is not None else None
        found: list[int] = []
        for each in manager.processes if manager is not None else ():
            if each.pid is not None:
                found += process_tree(each.pid)
        return found

    # ------------------------------------------------------------------------------------------------------------------
    # life
    # ------------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the processes, and let them compute once.

        An update in the very first forward pass was seen to break an engine.
        """
        with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
            model = self.describe(folder)
            with preserve_process_state():
                self.llm = self.loop.call(self._open(model))
        self.call(self._warm_up())
        self.courier.join(SyncClient(self.llm, self.call, lambda: self.version), self.options.engine_devices)

    async def _open(self, model: str) -> Any:
        """Return vLLM's engine. Its processes have a deadline of vLLM's own (`VLLM_ENGINE_READY_TIMEOUT_S`).

        Raises:
            UsageError: vLLM cannot run the model, or not with these options.
        """
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        cpu = current_platform.is_cpu()
        self._sleeps, self._asleep = self.options.enable_sleep and not cpu, frozenset()
        free, total = (1, 1) if cpu else torch.cuda.mem_get_info()
        options = self.options
        os.environ[TRAINER] = str(os.getpid())
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork of a process that runs torch threads may deadlock
        try:
            arguments = AsyncEngineArgs(
                **engine_arguments(
                    options, model, self.dtype, cpu, memory_share(options.gpu_memory_utilization, free, total)
                ),
                **lora_arguments(self.lora_rank),
                trust_remote_code=self.trust_remote_code,
                weight_transfer_config=WeightTransferConfig(backend=f"rlhf_{options.transfer}"),
                tensor_parallel_size=options.tensor_parallel_size,
                pipeline_parallel_size=options.pipeline_parallel_size,
                data_parallel_size=options.data_parallel_size,
                device_ids=None if cpu else engine_gpus(options, os.environ),
                disable_log_stats=True,
            )
            with without_main_script(), quiet_children():
                llm = AsyncLLM.from_engine_args(arguments)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"vLLM cannot start with this model and these options: {reason_of(error)}") from error
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)  # we report a death in one line
        return llm

    async def _warm_up(self) -> None:
        from vllm import SamplingParams

        await ask(self.llm, [0], SamplingParams(max_tokens=1, detokenize=False), "warm-up", "warm-up")

    def _start_again(self, dead: Any) -> None:
        """Start the processes anew with the weights that they had, unless another thread already has.

        Args:
            dead: the engine that was seen to be dead.

        Raises:
            RunStopped: they have died too often.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        with self._life:
            if self.llm is not dead:
                return
            self._end()
            while self.llm is None:
                self.restarted += 1
                if self.restarted > self.options.restarts:
                    raise RunStopped(
                        f"the processes of rollout 'vllm' died {self.restarted} times, more than {option('restarts')} "
                        f"{self.options.restarts}; continue from the last checkpoint with {run_option('resume')}"
                    )
                log.warning(f"the processes of rollout 'vllm' died and restart now ({self.restarted})")
                try:
                    self._start()
                    if self.courier.has_weights:
                        self.courier.send()
                except EngineDeadError:
                    self._end()

    def kill(self) -> None:
        """End the processes at once."""
        kill_all(self.processes)

    def _end(self) -> None:
        """End what is left of the processes."""
        if self.llm is not None:
            left, resources = self.processes, self.llm.engine_core.resources
            manager = resources.engine_manager
            self.llm.shutdown(timeout=0)  # there is nothing to finish, and their own end takes long
            kill_all(left)
            for each in manager.processes if manager is not None else ():
                each.join(CLOSE_SECONDS)
            self.loop.call(destroy_context(resources.ctx), CLOSE_SECONDS)
            self.llm.shutdown = _do_nothing  # vLLM calls it once more, at an interpreter's end that has no modules left
            self.llm = None
            gc.unfreeze()  # vLLM freezes what it made, which would stay to the end of the interpreter
            gc.collect()

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give device memory back; returns its bytes. The device's weights are dropped at any level: the store has them."""
        if not self._sleeps or self._asleep == PARTS:
            return 0
        before = free_bytes()
        with self._life:
            self.call(self.llm.sleep(level=2, mode="keep"))
            self._asleep = PARTS
        return free_bytes() - before

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again; returns its bytes."""
        woken = self._asleep & parts_of(part)
        if not woken:
            return 0
        before = free_bytes()
        with self._life:
            self._wake(woken)
            if "weights" in woken:
                self.courier.send()
        return before - free_bytes()

    def _wake(self, parts: frozenset[str]) -> None:
        """Take the memory of parts again, without what was in it."""
        if parts:
            self.call(self.llm.wake_up(tags_of(parts)))
            self._asleep -= parts

    @property
    def has_weights(self) -> bool:
        """True if a role's weights can be brought."""
        return self.courier.has_weights

    def close(self) -> None:
        """Free everything."""
        self._end()
        self.loop.close()
        self.courier.close()

    # ------------------------------------------------------------------------------------------------------------------
    # completions
    # ------------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        adapter: Adapter | None = None,
    ) -> list[Any]:
        """Return vLLM's completion of each prompt, in order.

        Raises:
            RunStopped: the processes died too often.
        """
        answers: dict[int, Any] = {}
        lora = adapter.request() if adapter is not None else None
        while len(answers) < len(prompts):
            left = [i for i in range(len(prompts)) if i not in answers]
            with self._life:  # no request gets in between the calls of an update
                llm, salt, number = self.llm, f"version {self.version}", self._count(len(left))
            try:
                tries = [f"{names[i]}#{number}.{i}" for i in left]  # a request that is asked again has another number
                asks = {
                    i: ask(llm, prompts[i], sampling_params(parameters[i]), name, salt, lora)
                    for i, name in zip(left, tries, strict=True)
                }
                alive = self.loop.call(gather(asks, answers, partial(self._is_alive, llm)))
            finally:
                self._count(-len(left))
            if not alive:
                self._start_again(llm)
        return [answers[i] for i in range(len(prompts))]

    def _count(self, more: int) -> int:
        """Count requests that wait from now on, or that are over; return a new number."""
        with self._counting:  # an update compares weights by requests, while others wait
            self._waiting += more
            self._asked += 1
            return self._asked

    async def _is_alive(self, llm: Any) -> bool:
        """Return True if the engine answers in time; end its processes otherwise."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await asyncio.wait_for(llm.get_weight_version(), self.options.answer_seconds)
        except EngineDeadError:
            return False
        except TimeoutError:
            log.warning(f"the processes of rollout 'vllm' did not answer within {self.options.answer_seconds:g} s")
            self.kill()
            return False
        return True

    # ------------------------------------------------------------------------------------------------------------------
    # weights
    # ------------------------------------------------------------------------------------------------------------------

    def checksums(self) -> list[dict[int, int]]:
        """Return the checksum of each layer's weights, of each copy; none if they are quantized or spread over workers."""
        options = self.options
        if options.quantization or options.tensor_parallel_size * options.pipeline_parallel_size > 1:
            return []
        with self._life:
            return [dict(pairs) for pairs in self.call(self.llm.collective_rpc("rlhf_checksums"))]

    def take(self, role: Role | BaseWeights) -> Mapping[str, float]:
        """Take the role's weights, completions in progress or not: a fixed number of calls.

        Returns:
            `sync/bytes`, `sync/seconds`, `sync/calls`, `sync/restarts`.

        Raises:
            ContractError: the role left weights out.
            RunStopped: the processes died too often.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        started = time.perf_counter()
        with self._life:
            self.courier.begin(role)
            self.version = str(role.version)
            self._wake(self._asleep & {"weights"})
            llm, paused = self.llm, self._waiting > 0
            try:
                self._deliver(llm, paused)
            except EngineDeadError:
                self._start_again(llm)
        return {
            "sync/bytes": float(self.courier.bytes),
            "sync/seconds": time.perf_counter() - started,
            "sync/calls": 5.0 if paused else 3.0,
            "sync/restarts": float(self.restarted),
        }

    def _deliver(self, llm: Any, paused: bool) -> None:
        """Announce the weights in the store to the engine; completions stop meanwhile if `paused`."""
        if paused:
            self.call(llm.pause_generation(mode="keep", clear_cache=False))
        try:
            self.courier.send()
        finally:
            if paused:
                self.call(llm.resume_generation())

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what a call of the engine returns.

        Raises:
            ContractError: weights were left out.
            EngineDeadError: the engine is dead, or does not answer; then its processes are ended.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self.loop.call(work, self.options.answer_seconds)
        except TimeoutError:
            self.kill()
            raise EngineDeadError from None
        except EngineDeadError:
            raise
        except Exception as error:
            text = str(error)
            if LEFT_OUT in text:
                raise ContractError(left_out(text)) from error
            raise


def _do_nothing() -> None:
    """Stand for a call that has been made."""
