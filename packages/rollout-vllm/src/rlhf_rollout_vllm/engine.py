"""`--rollout vllm`: completions from vLLM in this process, in separate processes or at servers, with the weights of a role.

One engine per sampled role, opened at the first call. Its weights come from the role and nowhere else, when it is opened
and after every update, always by the same path (`receivers`); after opening and after the first update the engine is
compared with its trainer (`agreement`). Token ids go in and come out; nothing is decoded on the way.

This file is what the loop sees of every way to run vLLM (`session.Host`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.providers import Rollout
from rlhf_core.errors import OptionError, UsageError, option, run_option
from rlhf_rollout_vllm.arguments import CPU_CACHE_GIB, memory_share
from rlhf_rollout_vllm.options import VLLMOptions

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.memory import ModelSize, SamplingLoad
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.plan import Plan, RoleSpec
    from rlhf_core.contract.roles import Role
    from rlhf_rollout_vllm.session import Engine

__all__ = ["VLLM", "VLLMEngines"]


@dataclass(frozen=True)
class VLLM(VLLMOptions, Rollout):
    """Samples with vLLM in this process, in separate processes or at servers, on CUDA or the CPU; weights follow every update.

    Log-probabilities are those of the distribution that was sampled from, after temperature and truncation; with
    temperature 0 they are the untruncated ones at temperature 1. Where top-p, top-k or min-p truncate, the mean share of the
    probability that they kept is returned as the scalar `kept_mass`, measured on a few completions of each batch.
    """

    @property
    def min_p_first(self) -> bool:
        """vLLM takes min-p as a logits processor, before top-k and top-p (its `v1/sample/sampler.py`, step 7)."""
        return True

    @property
    def devices(self) -> int:
        """Number of GPUs that an engine computes on."""
        return self.engine_devices

    @property
    def single_engine(self) -> bool:
        """An engine brings weights to all servers."""
        return bool(self.server) and self.transfer != "none"

    @property
    def weight_dtype(self) -> str:
        """The dtype that is given, if any."""
        return "" if self.dtype == "auto" else self.dtype

    @property
    def has_own_weights(self) -> bool:
        """Separate processes and servers have their own weights."""
        return self.is_apart

    @property
    def takes_weights_midway(self) -> bool:
        """Separate processes and servers pause with their cache. An adapter that is sent alone samples completions whole."""
        return self.is_apart and self.lora == "merged" and self.transfer != "none"

    def check(self) -> None:
        """Raise UsageError before any model is loaded if vLLM is missing, or if its weight loading is not known here.

        Servers that keep their weights need none here.
        """
        from rlhf_rollout_vllm.install import check_installed

        if not self.server or self.transfer != "none":
            check_installed()

    def check_plan(self, plan: Plan) -> None:
        """Raise UsageError if the processes of an engine cannot share the heads of a sampled model evenly.

        Also raise it if servers keep their weights and the sampled role is trained.
        """
        changing = [name for name, spec in plan.roles.items() if spec.sampled and spec.trained]
        if self.transfer == "none" and changing:
            raise OptionError(
                "transfer", f"none is for roles that no term trains, and {changing[0]} is trained; choose another way"
            )
        size = self.tensor_parallel_size
        for spec in plan.roles.values() if size > 1 else ():
            if spec.sampled:
                _check_heads(size, spec)

    def memory(self, size: ModelSize, load: SamplingLoad) -> int:
        """Return the bytes of an engine on one of its GPUs: its part of the weights, and the cache that vLLM reserves.

        vLLM takes its whole share of a device when it starts, however few samples there are (`arguments.memory_share`).
        """
        if self.server or self.transfer == "nccl":  # on other GPUs than the role's, or not of the run
            return 0
        weights = size.parameters * size.compute_bytes // (self.tensor_parallel_size * self.pipeline_parallel_size)
        if self.kv_cache_gib or not load.device_bytes:
            return weights + int((self.kv_cache_gib or CPU_CACHE_GIB) * 2**30)
        share = memory_share(self.gpu_memory_utilization, load.free_bytes, load.device_bytes)
        return max(weights, int(share * load.device_bytes))

    def open(self, context: OpenContext) -> VLLMEngines:
        """Return engines that start vLLM for a role when it is first sampled."""
        ahead = context.plan is not None and context.plan.config.ahead > 0
        if ahead and self.is_apart and self.transfer in ("ipc", "nccl") and self.restarts:
            raise OptionError(
                "restarts",
                f"with {run_option('ahead')} needs weights that the trainer no longer has; pass "
                f"{option('restarts', 0)} or {option('transfer', 'shared_memory')}",
            )
        return VLLMEngines(self, ahead)


def _check_heads(size: int, spec: RoleSpec) -> None:
    """Check that vLLM can split the attention heads of a role's model over processes.

    Heads of queries are dealt evenly. Those of keys and values are dealt, or each is on several processes.

    Raises:
        UsageError: it cannot.
    """
    from rlhf_core.models.loading.limits import attention_heads

    found = attention_heads(spec.options.model, spec.options)
    if found is None:
        return
    heads, groups = found
    whose = f"of {spec.options.model}, the model of role {spec.name}"
    if heads % size:
        raise OptionError(
            "tensor_parallel_size",
            f"{size} does not divide the {heads} attention heads {whose}; choose a number that does",
        )
    if groups % size and size % groups:
        raise OptionError(
            "tensor_parallel_size",
            f"{size} neither divides the {groups} key-value heads {whose}, nor is a multiple of them; choose a number "
            "that does",
        )


class VLLMEngines(Rollout):
    """One engine of vLLM per sampled role.

    Args:
        options: the provider.
        ahead: the role trains while completions are sampled, so that nothing is asked of it then.
    """

    def __init__(self, options: VLLM, ahead: bool = False) -> None:
        self.options, self.ahead = options, ahead
        self.engines: dict[str, Engine] = {}
        """open engines by role"""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """`sampling.n` completions of each prompt.

        Raises:
            MissingPackage: vLLM is not installed.
            UsageError: it cannot run this model, or a prompt is too long for it.
            RunStopped: engine and trainer disagree about the first completions.
        """
        return self._sample(role, prompts, sampling, measured=True)

    @contextmanager
    def session(self, role: Role) -> Iterator[Callable[[Prompts, Sampling], Rollouts]]:
        """Measure the kept probability in the first turn alone: all ranks take part in that forward pass."""
        turns = count()

        def sample(prompts: Prompts, sampling: Sampling) -> Rollouts:
            return self._sample(role, prompts, sampling, measured=next(turns) == 0)

        yield sample

    def _sample(self, role: Role, prompts: Prompts, sampling: Sampling, measured: bool) -> Rollouts:
        """Sample, and measure the probability that truncation kept if `measured`."""
        if any(prompts.images):
            raise UsageError(
                f"rollout vllm does not support images: use {run_option('rollout', 'hf')} for prompts with images"
            )
        from rlhf_rollout_vllm.agreement import check, compare_weights, kept_mass
        from rlhf_rollout_vllm.session import Engine

        engine = self.engines.get(role.name)
        if engine is None:
            engine = self.engines[role.name] = Engine(self.options, role)
            engine.update(role)
            compare_weights(engine, role, "loading")
            check(engine, role, prompts, "loading")
        elif engine.version != role.version and not self.ahead:  # for example, a checkpoint was restored
            engine.update(role)
        rollouts = engine.sample(prompts, sampling)
        truncated = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        if measured and truncated and not self.ahead and sampling.temperature == role.spec.temperature:
            rollouts.scalars["kept_mass"] = kept_mass(role, rollouts)
        return rollouts

    def sync(self, role: Role) -> Mapping[str, float]:
        """Take the role's weights, unless the engine has them. An engine that is not open yet will start with them.

        Returns:
            `sync/bytes`, `sync/seconds`, `sync/calls` (to the engine), and after the first update how far engine and trainer
            are apart: `sync/logprob_diff_mean`, `sync/logprob_diff_max`.

        Raises:
            ContractError: the role left weights out.
            RunStopped: engine and trainer disagree after the first update.
        """
        from rlhf_rollout_vllm.agreement import check, compare_weights

        engine = self.engines.get(role.name)
        if engine is None or engine.version == role.version:
            return {}
        metrics = engine.update(role)
        update, every = engine.updates - 1, self.options.check_weights  # the first was part of opening it
        if update == 1 or (every and update % every == 0):
            compare_weights(engine, role, f"update {update}")
        if update == 1:
            metrics |= check(engine, role, engine.probe, "the first update")
        return metrics

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give memory back, with `enable_sleep`, until `wake`: drop the cache, and move weights to the host or drop them."""
        return sum(engine.sleep(level) for engine in self.engines.values())

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again."""
        return sum(engine.wake(part) for engine in self.engines.values())

    def close(self) -> None:
        """Shut the engines down and free what they hold."""
        while self.engines:
            self.engines.popitem()[1].close()
