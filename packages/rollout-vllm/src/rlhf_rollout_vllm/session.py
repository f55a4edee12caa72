"""One vLLM engine with the weights of one role: opened, sampled, updated, put to sleep and closed, wherever it runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_core.contract.options import TrainedOptions
from rlhf_core.errors import UsageError, option, run_option
from rlhf_rollout_vllm.adapters import AdapterFolders, BaseWeights
from rlhf_rollout_vllm.description import describe_model
from rlhf_rollout_vllm.in_process import InProcess
from rlhf_rollout_vllm.kept_tokens import listed_tokens, read_kept_sets, sampled_logprobs
from rlhf_rollout_vllm.own_process import OwnProcess
from rlhf_rollout_vllm.parameters import Parameters, check_temperature
from rlhf_rollout_vllm.server_host import ServerHost

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.options import ModelOptions, Sampling
    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.adapters import Adapter
    from rlhf_rollout_vllm.options import VLLMOptions

__all__ = ["Engine", "Host"]


class Host(Protocol):
    """Process in which vLLM runs."""

    @property
    def has_weights(self) -> bool:
        """True if a role's weights are there, on the device or in main memory."""
        ...

    @property
    def model_config(self) -> Any:
        """vLLM's description of the model."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        adapter: Adapter | None = None,
    ) -> list[Any]:
        """Return vLLM's completion of each prompt, in order; `names` identify them.

        With `adapter` they are sampled with it, from the first token to the last one.
        """
        ...

    def checksums(self) -> list[dict[int, int]]:
        """Return the checksum of each layer's weights, of each worker that has all of them; none if no worker has."""
        ...

    def take(self, role: Role | BaseWeights) -> Mapping[str, float]:
        """Take the role's weights; returns `sync/bytes`, `sync/seconds`, `sync/calls`."""
        ...

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give device memory back; returns its bytes. Level 2 may drop the weights, which `take` then brings."""
        ...

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again; returns its bytes."""
        ...

    def close(self) -> None:
        """Free everything."""


class Engine:
    """vLLM, sampling the role it was opened for.

    Args:
        options: the provider.
        role: whose model it runs; its weights are taken by `update`.
    """

    probe: Prompts
    """prompts on which engine and trainer are compared"""

    def __init__(self, options: VLLMOptions, role: Role) -> None:
        from rlhf_core.models.loading.end_tokens import end_ids
        from rlhf_core.models.loading.limits import lacking_ids
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        model = role.spec.options
        self.options = options
        self.dtype = model.compute_dtype if options.dtype == "auto" else options.dtype
        self.version: int | None = None
        """the role's version that its weights are from; None before the first `update`"""
        self.updates = 0
        self.tokenizer = load_tokenizer(model.model, model)
        self.adapters = AdapterFolders() if options.lora == "adapter" else None
        """the role's adapters, where they come apart from the weights"""
        self._base_is_there = False
        self.changed_layers: frozenset[int] | None = None
        """layers whose weights vLLM changes on loading; None before the first comparison by checksums"""
        self.host: Host = self._open(model)
        width = int(self.host.model_config.get_vocab_size())
        self.parameters = Parameters(
            options, end_ids(role.spec, self.tokenizer), width, lacking_ids(self.tokenizer, width)
        )

    def _open(self, model: ModelOptions) -> Host:
        """Return vLLM, where the options want it."""
        if self.options.server:
            return ServerHost(self.options, partial(describe_model, model), self.dtype, model.trust_remote_code)
        rank = model.lora.rank if self.adapters is not None and isinstance(model, TrainedOptions) else 0
        how = (self.dtype, model.trust_remote_code, rank)
        if self.options.process == "own":
            return OwnProcess(self.options, partial(describe_model, model), *how)
        with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
            return InProcess(self.options, describe_model(model, folder), *how)

    @property
    def window(self) -> int:
        """Tokens that a prompt and its completion have together, at most."""
        return int(self.host.model_config.max_model_len)

    def sample(self, prompts: Prompts, sampling: Sampling, whole_head: bool = False) -> Rollouts:
        """`sampling.n` completions of each prompt, each with its own seed; from ids that the tokenizer has.

        With `whole_head` from all ids, with the probabilities that the role has.

        Raises:
            UsageError: a prompt is too long, or the temperature too low.
        """
        from rlhf_core.rollout.assemble import assemble

        check_temperature(sampling.temperature)
        limits = prompts.limits or [sampling.max_new_tokens] * len(prompts)
        longest, room = max(zip(map(len, prompts.token_ids), limits, strict=True), key=sum)
        if longest + room > self.window:
            raise UsageError(
                f"a prompt of {longest} tokens and {room} new ones exceed the {self.window} positions of "
                f"the engine; lower {run_option('max_prompt_tokens')} or "
                f"{run_option('sampling.max_new_tokens')}, or raise {option('max_model_len')} or "
                f"{option('kv_cache_gib')}"
            )
        rows = [
            (ids, self.parameters(sampling, sampling.seed_for(uid, k), limit, whole_head), f"{uid}/{k}")
            for ids, uid, limit in zip(prompts.token_ids, prompts.uids, limits, strict=True)
            for k in range(sampling.n)
        ]
        self.host.wake()
        adapter = self.adapters.newest if self.adapters is not None else None
        asked, parameters, names = zip(*rows, strict=True)
        completions = self.host.generate(asked, parameters, names, adapter)
        version = adapter.version if adapter is not None else self.version
        assert version is not None, "update comes first"
        told = listed_tokens(sampling, self.parameters.width) > 0
        return assemble(
            prompts,
            [list(each.token_ids) for each in completions],
            [each.finish_reason for each in completions],
            self.tokenizer,
            version=version,
            versions=_versions(completions, version) if adapter is None else None,
            per_token={"sampler_logprobs_NT": [sampled_logprobs(each.logprobs) for each in completions]},
            kept_sets=[read_kept_sets(each.logprobs, self.parameters.lacking) for each in completions] if told else (),
        )

    def update(self, role: Role) -> dict[str, float]:
        """Take the role's weights, or its adapter alone once those under it are there.

        Returns:
            `sync/bytes`, `sync/seconds`, `sync/calls`.
        """
        metrics = self._take_adapter(role) if self.adapters is not None else dict(self.host.take(role))
        self.version = role.version
        self.updates += 1
        return metrics

    def _take_adapter(self, role: Role) -> dict[str, float]:
        """Write the role's adapter where the engine reads it; the first time it takes the weights under it, too.

        Returns:
            `sync/bytes`, `sync/seconds`, `sync/calls`.
        """
        assert self.adapters is not None
        started = time.perf_counter()
        adapter = self.adapters.write(role)
        if not self._base_is_there:
            metrics = dict(self.host.take(BaseWeights(role)))
            self._base_is_there = True
            return metrics
        return {"sync/bytes": float(adapter.size), "sync/seconds": time.perf_counter() - started, "sync/calls": 0.0}

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give device memory back; returns its bytes. Level 2 may drop the weights, which `update` then brings."""
        freed = self.host.sleep(level)
        if not self.host.has_weights:
            self.version = None
        return freed

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again; returns its bytes."""
        return self.host.wake(part)

    def close(self) -> None:
        """Free everything."""
        self.host.close()
        if self.adapters is not None:
            self.adapters.close()


def _versions(completions: Sequence[Any], version: int) -> list[list[int]] | None:
    """Return the version of each token of each completion; None if all have `version`."""
    spans = [each.weight_versions or [] for each in completions]
    if all(span.version == str(version) for row in spans for span in row):
        return None
    return [[int(span.version) for span in row for _ in range(span.start, span.end)] for row in spans]
