"""One vLLM engine with the weights of one role: opened, sampled, updated, put to sleep and closed."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.errors import OptionError, UsageError, option, run_option
from rlhf_core.lazy import torch
from rlhf_core.util.device_memory import free_bytes
from rlhf_rollout_vllm.install import import_vllm
from rlhf_rollout_vllm.kept_tokens import MOST, listed_tokens, read_kept_sets, sampled_logprobs

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.options import ModelOptions, Sampling
    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.options import VLLMOptions

__all__ = ["Engine"]

TRANSFER = "rlhf_in_process"
"""What `transfer.InProcess` is called in vLLM."""

CPU_CACHE_GIB = 4.0

TAGS = {"weights": "weights", "cache": "kv_cache"}
"""Parts of an engine that wake by themselves, and what vLLM calls them."""
PARTS = frozenset(TAGS)

TEMPERATURE_LEAST = 0.01  # below it vLLM silently takes this one, but for 0

NEVER = -100.0  # the lowest bias on a logit that vLLM takes: e^-100 is never drawn

TOP_P_LEAST = 1e-6  # vLLM wants a number above 0; the most likely token is kept whatever it is


class Engine:
    """vLLM in this process, sampling the role it was opened for.

    Args:
        options: the provider.
        role: whose model it runs; its weights are taken by `update`.
    """

    probe: Prompts
    """the prompts that engine and trainer are compared on"""

    def __init__(self, options: VLLMOptions, role: Role) -> None:
        from rlhf_core.models.loading.end_tokens import end_ids
        from rlhf_core.models.loading.limits import lacking_ids
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        self.vllm = import_vllm()
        self.options = options
        self.dtype = role.spec.options.compute_dtype if options.dtype == "auto" else options.dtype
        self.version: int | None = None
        """the role's version that its weights are from; None before the first `update`"""
        self.updates = 0
        self.tokenizer = load_tokenizer(role.spec.options.model, role.spec.options)
        self.ends = end_ids(role.spec, self.tokenizer)
        self.lacking: tuple[int, ...] = ()
        """ids of the head that the tokenizer has no token for"""
        self._asleep: frozenset[str] = frozenset()
        """parts whose memory is given back"""
        _groups.prepare()
        with preserve_process_state(), tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
            self.llm = self._open(_description(role.spec.options, folder), role.spec.options.trust_remote_code)
        _groups.acquire()
        self.width: int = self.llm.llm_engine.model_config.get_vocab_size()
        self.lacking = lacking_ids(self.tokenizer, self.width)

    def _open(self, model: str, trust_remote_code: bool) -> Any:
        """vLLM's engine, its weights still arbitrary.

        Raises:
            UsageError: vLLM cannot run the model, or not with these options.
        """
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        _register_transfer()
        cpu = current_platform.is_cpu()
        cache_gib = self.options.kv_cache_gib or (CPU_CACHE_GIB if cpu else 0.0)
        eager = cpu if self.options.enforce_eager is None else self.options.enforce_eager
        self._sleeps = self.options.enable_sleep and not cpu
        if self._sleeps and _groups.users:
            raise OptionError(
                "enable_sleep",
                "is for runs that sample one role: vLLM lets one engine of a process sleep; leave it out",
            )
        try:
            llm = self.vllm.LLM(
                model,
                trust_remote_code=trust_remote_code,
                dtype=self.dtype,
                load_format="dummy",
                weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
                max_model_len=self.options.max_model_len or -1,
                max_num_seqs=self.options.max_num_seqs,
                kv_cache_memory_bytes=int(cache_gib * 2**30) or None,
                gpu_memory_utilization=self.options.gpu_memory_utilization,
                enforce_eager=eager,
                distributed_executor_backend=None if cpu else _external_launcher(),
                enable_prefix_caching=self.options.enable_prefix_caching,
                enable_chunked_prefill=False if cpu else None,  # a seed would be rewound, which fails on the CPU
                enable_sleep_mode=self._sleeps,
                logprobs_mode="processed_logprobs",
                max_logprobs=MOST,
                generation_config="vllm",  # sampling is the run's, not the model's
            )
        except ValueError as error:
            reasons = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = next((line for line in reasons if "validation error" not in line and len(line) > 20), reasons[0])
            raise UsageError(f"vLLM does not start with this model and these options: {reason}") from error
        (kind,) = llm.apply_model(_class_name)
        if kind.startswith("Transformers"):
            raise UsageError(
                f"vLLM has no {llm.model_config.architecture} of its own, and the one that it borrows from transformers "
                f"would change the model that is trained in this process; use {run_option('rollout', 'hf')}"
            )
        return llm

    @property
    def window(self) -> int:
        """Tokens that a prompt and its completion have together, at most."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    def sample(self, prompts: Prompts, sampling: Sampling, whole_head: bool = False) -> Rollouts:
        """`sampling.n` completions of each prompt, each with a seed of its own; from ids that the tokenizer has.

        With `whole_head` from all ids, with the probabilities that the role has.

        Raises:
            UsageError: a prompt is too long, or the temperature too low.
        """
        from rlhf_core.rollout.assemble import assemble

        if 0 < sampling.temperature < TEMPERATURE_LEAST:
            raise UsageError(
                f"vLLM does not sample at a temperature of {sampling.temperature:g}; give "
                f"{run_option('sampling.temperature', 0)} or at least "
                f"{TEMPERATURE_LEAST:g}, or use {run_option('rollout', 'hf')}"
            )
        limits = prompts.limits or [sampling.max_new_tokens] * len(prompts)
        longest, room = max(zip(map(len, prompts.token_ids), limits, strict=True), key=sum)
        if longest + room > self.window:
            raise UsageError(
                f"a prompt of {longest} tokens and {room} new ones exceed the {self.window} positions of "
                f"the engine; lower {run_option('max_prompt_tokens')} or "
                f"{run_option('sampling.max_new_tokens')}, or raise {option('max_model_len')} or "
                f"{option('kv_cache_gib')}"
            )
        asked = [{"prompt_token_ids": ids} for ids in prompts.token_ids for _ in range(sampling.n)]
        how = [
            self._params(sampling, sampling.seed_for(uid, k), limit, () if whole_head else self.lacking)
            for uid, limit in zip(prompts.uids, limits, strict=True)
            for k in range(sampling.n)
        ]
        self.wake()
        with preserve_process_state():
            answers = self.llm.generate(asked, how, use_tqdm=False)
        completions = [answer.outputs[0] for answer in answers]
        assert self.version is not None, "update comes first"
        told = listed_tokens(sampling, self.width) > 0
        return assemble(
            prompts,
            [list(each.token_ids) for each in completions],
            [each.finish_reason for each in completions],
            self.tokenizer,
            version=self.version,
            per_token={"sampler_logprobs_NT": [sampled_logprobs(each.logprobs) for each in completions]},
            kept_sets=[read_kept_sets(each.logprobs, self.lacking) for each in completions] if told else (),
        )

    def _params(self, sampling: Sampling, seed: int, max_tokens: int, lacking: Sequence[int]) -> Any:
        """One completion's sampling parameters; never shared. It ends with the run's end tokens and with no other."""
        return self.vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=max(sampling.top_p, TOP_P_LEAST),
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=list(self.ends),
            ignore_eos=True,  # vLLM's own idea of it
            logit_bias=dict.fromkeys(lacking, NEVER) or None,
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),  # only to find stop strings
            seed=seed,
            logprobs=listed_tokens(sampling, self.width),  # and of the sampled token
            flat_logprobs=True,
            skip_clone=True,
        )

    def update(self, role: Role) -> dict[str, float]:
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
        self.version = role.version
        self.updates += 1
        return {
            "sync/bytes": float(weights.bytes),
            "sync/seconds": time.perf_counter() - started,
            "sync/calls": 4.0,
        }

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give device memory back; returns its bytes. Level 2 drops the weights, which `update` then brings."""
        if not self._sleeps or self._asleep == PARTS:
            return 0
        before = free_bytes()
        self.llm.sleep(level=level)
        self._asleep = PARTS
        if level == 2:
            self.version = None
        return free_bytes() - before

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again; returns its bytes."""
        woken = self._asleep & (PARTS if part == "all" else {part})
        if not woken:
            return 0
        before = free_bytes()
        self.llm.wake_up(tags=[TAGS[each] for each in sorted(woken, reverse=True)])
        self._asleep -= woken
        return before - free_bytes()

    def close(self) -> None:
        """Free everything; the process groups too, if no other engine of the process is open."""
        client = self.llm.llm_engine.engine_core
        client._finalizer.detach()  # it would destroy the groups whoever uses them, the trainer's too
        client.engine_core.model_executor.shutdown()
        client.engine_core.scheduler.shutdown()
        del self.llm, client
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _groups.release()


def _external_launcher() -> str | None:
    """vLLM's name for ranks that a launcher started, each with an engine of its own, which then takes its rank's GPU, not the
    first one."""
    return "external_launcher" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


class _ProcessGroups:
    """vLLM's process groups. vLLM keeps them in globals of its own, so that all engines of a process share them."""

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


def _description(options: ModelOptions, folder: str) -> str:
    """Where vLLM reads configuration and tokenizer: a folder or a hub name. It needs no weights there.

    They are written to `folder` where no place has them as the role does: a model without files, or one with new tokens.
    """
    from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM

    from rlhf_core.models.loading import tiny
    from rlhf_core.models.loading.adapters import read_base_model
    from rlhf_core.models.loading.convert import convert_gguf
    from rlhf_core.models.loading.hub import resolve_name
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    name = options.model
    while (source := resolve_name(name)).kind == "adapter":  # its weights are merged into those of its base
        name = read_base_model(Path(source.location))
    place = str(convert_gguf(Path(source.location))) if source.kind == "gguf" else source.location
    if source.kind == "tiny":
        config = tiny.parse(name).model(LlamaForCausalLM, "sdpa", torch.float32).config
        config.architectures = [LlamaForCausalLM.__name__]
    else:
        config = AutoConfig.from_pretrained(place, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options)
    text = config.get_text_config(decoder=True)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if source.kind != "tiny" and tokens <= text.vocab_size:
        return place
    text.vocab_size = max(tokens, text.vocab_size)  # as `rlhf_core.models.loading.grow` has it
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with suppress(OSError):  # its end tokens, where the model has such a file
        GenerationConfig.from_pretrained(place).save_pretrained(folder)
    return folder


def _register_transfer() -> None:
    """Make `transfer` known to vLLM."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER, "rlhf_rollout_vllm.transfer", "InProcess")


def _class_name(model: object) -> str:
    return type(model).__name__


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Put back what vLLM changes in a process that it takes for its own: random states, threads, the GPU, the exception hook.

    Warnings are its own too; what matters of them is raised as an error.
    """
    import numpy as np
    import torch  # the module itself: one of its functions is put back

    threads, set_threads, hook = torch.get_num_threads(), torch.set_num_threads, sys.excepthook
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads = set_threads  # vLLM puts one there that does nothing
            torch.set_num_threads(threads)
            for device in devices:
                torch.cuda.set_device(device)  # an engine leaves its own one there
            sys.excepthook = hook
            random.setstate(python_state)
            np.random.set_state(numpy_state)
