"""Options of the rollout engine `vllm`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from rlhf_core.config.value_types import Secret
from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.util.http import LOOPBACK, is_address

__all__ = ["VLLMOptions"]

LARGEST_BIAS = 100.0  # vLLM takes no larger one

OF_STARTED_ENGINES = (
    "process",
    "max_model_len",
    "max_num_seqs",
    "kv_cache_gib",
    "gpu_memory_utilization",
    "enforce_eager",
    "enable_prefix_caching",
    "block_size",
    "enable_sleep",
    "quantization",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
)
"""Options that say how an engine is started."""

SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True)
class VLLMOptions:
    """Options of sampling with vLLM."""

    process: Literal["trainer", "own"] = "trainer"
    """placement of the engine: in the process that trains, or in separate processes on the same machine, which can
    sample while the role trains and may span several GPUs"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the engine; `auto` takes the role's dtype"""
    max_model_len: int = 0
    """longest prompt and completion together, in tokens; 0 takes what the model and the cache allow"""
    max_num_seqs: int = 0
    """maximum number of completions sampled at the same time; more wait. 0 takes vLLM's own number for the GPU, and 256
    on the CPU"""
    kv_cache_gib: float = 0.0
    """size of the key-value cache in GiB; 0 takes what `gpu_memory_utilization` leaves, and 4 on the CPU"""
    gpu_memory_utilization: float = 0.0
    """share of the GPU's memory for the engine, weights and cache, up to 1; 0 takes half of the memory that is free
    when the engine opens, since training shares the device. Ignored on the CPU"""
    enforce_eager: bool | None = None
    """run without compilation and CUDA graphs, which is slower and starts faster. By default only on the CPU"""
    enable_prefix_caching: bool = True
    """compute a prompt once for all its completions (again after each update)"""
    block_size: int = 0
    """tokens in a block of the key-value cache. Turns of a conversation reuse whole blocks, so smaller ones compute fewer
    tokens again. 0 takes vLLM's own number: 128 on the CPU, which takes multiples of 32, and usually 16 on a GPU"""
    enable_sleep: bool = False
    """let the engine's weights and cache leave the GPU when a launcher puts it to sleep (`--launcher.share-memory`); for one
    sampled role, not on the CPU"""
    max_logprob_diff: float = 0.0
    """largest mean difference in log-probabilities of the same tokens between engine and trainer, in nats; a larger one
    stops the run after opening or after the first update. 0 takes 0.001 for float32 and 0.05 for 16 bits, `inf` never
    stops"""
    check_weights: int = 0
    """number of updates between two comparisons of all weights of engine and trainer by checksums; 0 compares after
    opening and after the first update only"""
    quantization: Literal[
        "",
        "fp8_per_tensor",
        "fp8_per_block",
        "fp8_per_channel",
        "int8_per_channel_weight_only",
        "mxfp8",
        "nvfp4_per_token",
    ] = ""
    """rounding of weights as they arrive, by vLLM's names; by default none. Samples then come from another policy than
    the trained one: raise `max_logprob_diff`, and correct importance weights"""
    seed: int = 0
    """change of the seeds of all completions; engines with different seeds sample different completions of the same
    prompts"""
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    """values added to the logits of tokens by id, -100 to 100, such as 13=-100; training ignores it"""
    guided_regex: str = ""
    """regular expression that every completion matches unless it is cut; training ignores it"""
    guided_json: str = ""
    """JSON schema that every completion follows, as a file or as text; training ignores it"""
    guided_choice: tuple[str, ...] = ()
    """texts that every completion is chosen from; training ignores it"""
    tensor_parallel_size: int = 1
    """number of GPUs (processes on the CPU) that share each layer of an engine in separate processes"""
    pipeline_parallel_size: int = 1
    """number of GPUs (processes on the CPU) that share the layers of an engine in separate processes"""
    data_parallel_size: int = 1
    """number of copies of an engine in separate processes; each request goes to one of them"""
    transfer: Literal["shared_memory", "ipc", "nccl", "none"] = "shared_memory"
    """path of weights to servers and separate engine processes: shared memory of the machine, which keeps them for a
    restart; CUDA IPC, if the engine is on the trainer's GPUs; NCCL, if it is on others; none, if servers keep theirs"""
    lora: Literal["merged", "adapter"] = "merged"
    """form in which a role with LoRA reaches the engine: adapters merged into the weights, or apart from them, so that an
    update brings the adapters alone"""
    restarts: int = 3
    """number of times in a run that an engine in separate processes is restarted after a death, or that a server gets
    weights again that it lost; unanswered requests are repeated"""
    answer_seconds: float = 600.0
    """seconds within which a server or separate engine processes must answer a call; later the processes are killed, which
    counts as a death, and a request to a server is repeated"""
    server: tuple[str, ...] = ()
    """addresses of running vLLM servers with the role's model, such as http://127.0.0.1:8000, that sample instead of an
    engine of the run; several are replicas of one model"""
    token: Annotated[str, Secret()] = ""
    """bearer token of the servers; env:NAME reads it from the environment"""
    in_flight: int = 256
    """number of requests that a server has at a time; more wait"""
    retries: int = 5
    """number of times that a request is repeated after a failure, at another server if there is one"""

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "kv_cache_gib",
            "block_size",
            "max_logprob_diff",
            "check_weights",
        ):
            if not getattr(self, name) >= 0:  # written so that nan fails
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.gpu_memory_utilization <= 1:
            raise UsageError(
                f"gpu_memory_utilization must be at least 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        for token, bias in self.logit_bias.items():
            if not token.isdecimal() or not abs(bias) <= LARGEST_BIAS:
                raise OptionError(
                    "logit_bias", f"needs token ids with biases from -100 to 100, not {bias} for {token}; change it"
                )
        self._check_guide()
        self._check_server()
        self._check_process()
        self._check_lora()

    def _check_guide(self) -> None:
        """Check that at most one shape of completions is asked for, and that it can be read.

        Raises:
            UsageError: it is not so.
        """
        asked = [name for name in ("guided_regex", "guided_json", "guided_choice") if getattr(self, name)]
        if len(asked) > 1:
            raise OptionError(asked[0], f"cannot be combined with {option(asked[1])}; leave one out")
        if self.guided_regex:
            try:
                re.compile(self.guided_regex)
            except re.error as error:
                raise OptionError("guided_regex", f"is not a regular expression ({error}); correct it") from error
        if self.guided_json:
            self.json_schema()

    def _check_process(self) -> None:
        """Check the options of an engine in separate processes.

        Raises:
            UsageError: they do not fit.
        """
        if self.restarts < 0:
            raise OptionError("restarts", f"must be at least 0, not {self.restarts}")
        if not self.answer_seconds > 0:
            raise OptionError("answer_seconds", f"must be above 0, not {self.answer_seconds}")
        if self.transfer != "shared_memory" and not self.is_apart:
            raise OptionError(
                "transfer", f"works only with engines in separate processes; pass {option('process', 'own')}"
            )
        if self.transfer == "ipc" and self.engine_devices > 1:
            raise OptionError(
                "transfer", f"ipc works only on the trainer's GPU; pass {option('transfer', 'shared_memory')}"
            )
        for name in SIZES:
            size = getattr(self, name)
            if size < 1:
                raise OptionError(name, f"must be at least 1, not {size}")
            if size > 1 and self.process == "trainer":
                raise OptionError(
                    name, f"works only with engines in separate processes; pass {option('process', 'own')}"
                )

    def _check_lora(self) -> None:
        """Check that adapters can come apart from the weights.

        Raises:
            UsageError: they cannot.
        """
        if self.lora == "merged":
            return
        if self.server or self.transfer != "shared_memory":
            name = "server" if self.server else "transfer"
            raise OptionError("lora", f"adapter does not go with {option(name)}; pass {option('lora', 'merged')}")
        if self.enable_sleep or self.quantization:
            name = "enable_sleep" if self.enable_sleep else "quantization"
            raise OptionError("lora", f"adapter does not go with {option(name)}; pass {option('lora', 'merged')}")

    def _check_server(self) -> None:
        """Check the options of servers.

        Raises:
            UsageError: they do not fit.
        """
        if self.transfer == "none" and not self.server:
            raise OptionError("transfer", f"none is for servers, which have weights; pass {option('server')}")
        if self.in_flight < 1:
            raise OptionError("in_flight", f"must be at least 1, not {self.in_flight}")
        if self.retries < 0:
            raise OptionError("retries", f"must be at least 0, not {self.retries}")
        if not self.server:
            return
        for url in self.server:
            if not is_address(url):
                raise OptionError("server", f": {url} is not an address such as http://127.0.0.1:8000; correct it")
            if self.transfer == "shared_memory" and urlsplit(url).hostname not in LOOPBACK:
                raise OptionError(
                    "transfer",
                    f"shared_memory does not reach {url}, another machine; pass {option('transfer', 'nccl')}",
                )
        if self.transfer == "ipc":
            raise OptionError("transfer", f"ipc does not go over HTTP; pass {option('transfer', 'nccl')}")
        defaults = {each.name: each.default for each in fields(VLLMOptions)}
        given = [name for name in OF_STARTED_ENGINES if getattr(self, name) != defaults[name]]
        if given:
            raise OptionError(given[0], "is of engines that a run starts, and servers have their own; leave it out")

    @property
    def is_apart(self) -> bool:
        """True if the engine is in other processes than the trainer."""
        return self.process == "own" or bool(self.server)

    @property
    def engine_devices(self) -> int:
        """GPUs (on the CPU processes) of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def parallel_sizes(self) -> list[str]:
        """Names of the sizes above 1."""
        return [name for name in SIZES if getattr(self, name) > 1]

    def json_schema(self) -> dict[str, Any]:
        """Return the schema that `guided_json` gives.

        Raises:
            UsageError: there is none.
        """
        text = self.guided_json.strip()
        try:
            if not text.startswith("{"):
                text = Path(text).expanduser().read_text(encoding="utf-8")
            schema = json.loads(text)
        except (OSError, ValueError) as error:
            raise OptionError(
                "guided_json", f"is neither a JSON schema nor a file that contains one ({error}); correct it"
            ) from error
        if not isinstance(schema, dict):
            raise OptionError("guided_json", "must be a JSON schema that is an object; correct it")
        return schema
