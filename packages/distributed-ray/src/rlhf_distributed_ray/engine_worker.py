"""Code inside a Ray actor that is a rollout engine: the engine, and mirrors of the roles that it samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.batch import Batch, Prompts, Rollouts
from rlhf_core.contract.distributed import World
from rlhf_core.contract.engines import Engines
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.token_budget import release_memory
from rlhf_core.util.random_states import seed_libraries
from rlhf_distributed_ray.arrays import from_array
from rlhf_distributed_ray.sending import ReceivedBuckets
from rlhf_distributed_ray.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling

__all__ = ["EngineWorker", "MirrorRole"]


class MirrorRole(Role):
    """A role as its rollout engine sees it from another process: the same weights, taken at each sync, never trained."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan = plan
        self.name = name
        self.spec = plan.roles[name]
        self.version = 0
        self._received: list[list[tuple[str, Any]]] = []
        self._sampled = False
        """the engine samples from the model itself"""
        self._inside = False
        """the last sync went into the model"""
        self._asleep = False
        """the model is out of device memory"""

    @cached_property
    def local(self) -> LocalRole:
        """The model itself, for engines that sample from it; built when first asked for, with what was received so far."""
        local = LocalRole(self.plan, self.name, frozen=True)
        for bucket in self._received:
            local.take_weights((name, from_array(packed)) for name, packed in bucket)
        return local

    def release(self) -> None:
        """Free the model, unless the engine samples from it or no other place has its weights."""
        if not self._sampled and not self._inside and self.__dict__.pop("local", None) is not None:
            release_memory()  # the engine is in this process, too, and may grow into it

    def sleep(self) -> int:
        """Give the memory of the model back, if there is one here; its bytes."""
        if self._asleep or "local" not in self.__dict__:
            return 0
        self._asleep = True
        return self.local.sleep()

    def wake(self) -> int:
        """Take it again; its bytes."""
        if not self._asleep:
            return 0
        self._asleep = False
        return self.local.wake()

    @property
    def module(self) -> Any:
        """The role's module."""
        self._sampled = True
        return self.local.module

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model inside."""
        return self.module.causal_lm

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the role's model, which is not built for it."""
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        return load_tokenizer(self.spec.options.model, self.spec.options)

    def gathered(self) -> AbstractContextManager[None]:
        """While it is open, the module holds full weights."""
        return self.local.gathered()

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, Tensor]:
        """The wanted outputs under the mirrored weights."""
        return self.local.infer(batch, names)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the last sync; before the first sync, the initial weights."""
        if not self._received:
            yield from self.local.weights()
            return
        for bucket in self._received:
            for name, packed in bucket:
                yield name, from_array(packed)

    def export(self, folder: str) -> None:
        """Write the Hugging Face folder."""
        self.local.export(folder)

    def receive(self, bucket: list[tuple[str, Any]], first: bool) -> None:
        """One bucket of a sync: into the model if there is one here, else kept for the engine to read."""
        if first:
            self._received, self._inside = [], "local" in self.__dict__
        if self._inside:
            self.local.take_weights((name, from_array(packed)) for name, packed in bucket)
        else:
            self._received.append(bucket)


class EngineWorker(Worker):
    """A rollout engine with mirrors of the roles it samples."""

    def initialize(self) -> tuple[str, int]:
        """Initialize the worker, the mirrors of the roles and the engine."""
        where = super().initialize()
        config = self.plan.config
        seed_libraries(config.seed)
        self.mirrors = {name: MirrorRole(self.plan, name) for name, spec in self.plan.roles.items() if spec.sampled}
        self.engines = Engines(config.seed, Path(config.output), self.plan)
        self.engines.bind(Placement(dict[str, Any](self.mirrors), None, World()))
        self.engine = self.engines.open(config.providers["rollout"], "rollout")
        self._received = {name: ReceivedBuckets() for name in self.mirrors}
        self._compared: set[tuple[str, str]] = set()
        return where

    def sample(self, role: str, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Completions of a mirrored role."""
        rollouts: Rollouts = self.engine(self.mirrors[role], prompts, sampling)
        self._release(role, "sample")
        return rollouts

    def receive(self, role: str, sync: int, number: int, bucket: list[tuple[str, Any]]) -> None:
        """Take a bucket of the weights of a sync, by its number in them."""
        if self._received[role].accept(sync, number, sum(array.nbytes for _, (_, array) in bucket)):
            self.mirrors[role].receive(bucket, number == 0)

    def finish_sync(self, role: str, version: int, sync: int, count: int) -> dict[str, float]:
        """Let the engine take the weights, all `count` buckets of which are here."""
        self._received[role].check(sync, count)
        self.mirrors[role].version = version
        metrics = {"sync/bytes": float(self._received[role].bytes), **(self.engine.sync(self.mirrors[role]) or {})}
        self._release(role, "synced")
        return metrics

    def _release(self, role: str, after: str) -> None:
        """Free the model that an engine was compared with, as engines are after opening and after the first sync. Who asks for
        it again does so for every batch, and keeps it."""
        if (role, after) not in self._compared:
            self._compared.add((role, after))
            self.mirrors[role].release()

    def sleep(self, level: Literal[1, 2]) -> int:
        """Give device memory back; its bytes."""
        return int(self.engine.sleep(level)) + sum(mirror.sleep() for mirror in self.mirrors.values())

    def wake(self, part: Literal["weights", "cache", "all"]) -> int:
        """Take the memory of a part again; its bytes."""
        woken = 0 if part == "cache" else sum(mirror.wake() for mirror in self.mirrors.values())
        return int(self.engine.wake(part)) + woken

    def state_dict(self) -> dict[str, Any]:
        """The states of the engine and those inside it, by place."""
        return self.engines.state_dict(clone=True)

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Continue from them."""
        self.engines.load_state_dict(states)

    def close(self) -> None:
        """Free everything."""
        self.engines.close()
