"""Code inside a Ray actor that is a rollout engine: the engine, and mirrors of the roles that it samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.batch import Batch, Prompts, Rollouts
from rlhf_core.contract.distributed import World
from rlhf_core.contract.engines import Engines
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.errors import RunStopped, run_option
from rlhf_core.lazy import torch
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.token_budget import release_memory
from rlhf_core.util.clock import wait_for
from rlhf_core.util.random_states import seed_libraries
from rlhf_distributed_ray.arrays import from_array
from rlhf_distributed_ray.sending import ReceivedBuckets
from rlhf_distributed_ray.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling

__all__ = ["EngineWorker", "MirrorRole"]


TAKE_SECONDS = 1800.0
"""Deadline for the forward pass after which an engine takes new weights."""

Buckets = list[list[tuple[str, Any]]]


class MirrorRole(Role):
    """A role as its rollout engine sees it from another process: the same weights, taken at each sync, never trained.

    Buckets are put aside until all of a sync are here. Then they become the role's weights at once. While an engine samples
    from the model itself, they wait for the end of a forward pass (`refresh`).
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan = plan
        self.name = name
        self.spec = plan.roles[name]
        self.version = 0
        self._midway = plan.config.partial.midway
        self._received: Buckets = []
        self._arriving: Buckets = []
        self._changed = threading.Condition()
        self._pending: tuple[int, Buckets] | None = None
        """version and buckets of weights that wait for the end of a forward pass"""
        self._whole: ExitStack | None = None
        """while an engine samples from the model, what holds its weights whole"""
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

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While it is open, the module holds full weights, which change only in `refresh`."""
        with ExitStack() as whole:
            with self._changed:
                whole.enter_context(self.local.gathered())
                self._whole = whole
            try:
                yield
            finally:
                with self._changed:
                    self._whole = None
                    whole.close()
                    self._take_pending()

    def refresh(self, change: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
        """Take the weights that have arrived since the last forward pass of a call."""
        if self._pending is not None:
            assert self._whole is not None, "called inside of `gathered`"
            with self._changed, change():
                self._whole.close()  # shares of weights are written, not copies of whole ones
                self._take_pending()
                self._whole.enter_context(self.local.gathered())
        return self.version

    def publish(self, version: int) -> None:
        """Let the buckets that were received be the weights from now on; returns when they are.

        Raises:
            RunStopped: the engine did not end a forward pass in time.
        """
        with self._changed:
            self._pending, self._arriving = (version, self._arriving), []
            if self._whole is None:
                self._take_pending()
            elif not wait_for(self._changed, lambda: self._pending is None, TAKE_SECONDS):
                raise RunStopped(
                    f"the rollout engine ended no forward pass in {TAKE_SECONDS:g} s; continue from the last checkpoint "
                    f"with {run_option('resume')}"
                )

    def _take_pending(self) -> None:
        """Take the weights that wait: into the model if there is one here, else for the engine to read."""
        if self._pending is None:
            return
        self.version, self._received = self._pending
        self._inside = "local" in self.__dict__
        if self._inside:
            with torch.inference_mode(False):
                for bucket in self._received:
                    self.local.take_weights((name, from_array(packed)) for name, packed in bucket)
            self._received = []
        self._pending = None
        self._changed.notify_all()

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
        """Put a bucket of a sync aside until `publish`."""
        if first:
            self._arriving = []
            if not self._midway:
                self._received = []  # nobody reads them any more, and the store need not hold two copies
        self._arriving.append(bucket)


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
        self._opening = threading.Lock()
        """held by the first call for a role: it reads weights to open an engine, so that no others come meanwhile"""
        self._opened: set[str] = set()
        self._compared: set[tuple[str, str]] = set()
        return where

    def sample(self, role: str, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Completions of a mirrored role."""
        with nullcontext() if role in self._opened else self._opening:
            rollouts: Rollouts = self.engine(self.mirrors[role], prompts, sampling)
            self._release(role, "sample")
        self._opened.add(role)
        return rollouts

    def receive(self, role: str, sync: int, number: int, bucket: list[tuple[str, Any]]) -> None:
        """Take a bucket of the weights of a sync, by its number in them."""
        if self._received[role].accept(sync, number, sum(array.nbytes for _, (_, array) in bucket)):
            self.mirrors[role].receive(bucket, number == 0)

    def finish_sync(self, role: str, version: int, sync: int, count: int) -> dict[str, float]:
        """Let the engine take the weights, all `count` buckets of which are here."""
        self._received[role].check(sync, count)
        with self._opening:
            if self._received[role].publish():
                self.mirrors[role].publish(version)
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
