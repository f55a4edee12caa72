"""What runs inside a Ray actor: one rank of a role, or a rollout engine. Of Ray only a node's address and devices are asked
in here, so that it can be read and tested as plain Python; `launcher` turns the classes into actors."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.batch import Batch, Prompts, Rollouts, StepInfo
from rlhf_core.contract.distributed import World
from rlhf_core.contract.engines import Engines
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.registry_view import PluginSelection
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.launcher.local import join_world
from rlhf_core.lazy import torch
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.planner import make_plan
from rlhf_core.training.taken_weights import TakenWeights
from rlhf_core.util.messages import install_console
from rlhf_core.util.random_states import get_random_states, seed_libraries, set_random_states
from rlhf_core.util.tensor_tree import read_tree, write_tree
from rlhf_distributed_ray.transport import unpack

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling

__all__ = ["Description", "EngineWorker", "MirrorRole", "RoleWorker", "plan_from"]

BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Description:
    """The run as it travels to a worker: names and options, and never functions."""

    plugins: PluginSelection
    """the plugins that are loaded there, those of `-p` too"""
    names: Mapping[str, Any]
    """the configuration, as `to_names` gives it"""
    versions: Mapping[str, str]
    """distribution and version of each provider, as the controller has them"""
    folder: str
    """where the run was started: relative paths mean it, and local modules are in it"""


def plan_from(run: Description) -> Plan:
    """The controller's plan, built again from names and options with the plugins of this process.

    Raises:
        UsageError: this process has other plugins than the controller.
    """
    from rlhf_core.config.builder import from_names
    from rlhf_core.errors import UsageError
    from rlhf_core.plugins.registry import Registry

    chosen = run.plugins
    registry = Registry(autoload=chosen.autoload, blocked=chosen.blocked, load=chosen.load)
    config = from_names(run.names, registry)
    mine, expected = versions(registry, config.names, config.uses), run.versions
    if mine != expected:
        differing = sorted(kind for kind in {*mine, *expected} if mine.get(kind) != expected.get(kind))
        pairs = ", ".join(f"{kind}: {expected.get(kind)} here, {mine.get(kind)} there" for kind in differing)
        raise UsageError(
            f"the plugins of {socket.gethostname()} differ from the controller's ({pairs}); install the same"
        )
    return make_plan(config)


def versions(registry: Any, names: Mapping[str, str], uses: Mapping[str, str]) -> dict[str, str]:
    """Distribution and version behind each chosen provider, by kind; of optimizers, by role (`actor.optim`)."""
    found = {kind: registry.provenance(kind, name) for kind, name in names.items() if isinstance(name, str)}
    found |= {path: registry.provenance("optimizer", name) for path, name in uses.items()}
    return {
        kind: " ".join(map(str, source)) if isinstance(source, tuple) else str(source) for kind, source in found.items()
    }


class Worker:
    """A process of the run: what all kinds of it do first.

    Nothing can fail while it is made: Ray tells a mistake there as a death.
    """

    def __init__(self, run: Description) -> None:
        self._run = run

    def initialize(self) -> tuple[str, int]:
        """Go to the folder that the run was started in, whose relative paths are meant, and build the plan; host name and
        process id, for messages.

        Raises:
            UsageError: that folder is not here, or other plugins are.
        """
        from rlhf_core.errors import UsageError

        try:
            os.chdir(self._run.folder)
        except OSError as error:
            raise UsageError(
                f"node {socket.gethostname()} has no folder {self._run.folder} ({error.strerror}); start the run in a folder "
                "that all nodes see"
            ) from None
        install_console()
        self.plan = plan_from(self._run)
        return socket.gethostname(), os.getpid()


class RoleWorker(Worker):
    """Rank `rank` of the `size` workers of a role."""

    def __init__(self, run: Description, role: str, rank: int, size: int) -> None:
        super().__init__(run)
        self.role_name, self.rank, self.size = role, rank, size
        self._bucket: Iterator[list[tuple[str, Any]]] | None = None
        self._taken: TakenWeights | None = None

    def address(self) -> tuple[str, int]:
        """This node's address, as the cluster knows it, and a free port, for the process group."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def devices(self) -> list[tuple[str, str]]:
        """The GPUs this worker was given, each with its node."""
        import ray

        context = ray.get_runtime_context()
        return [(context.get_node_id(), each) for each in context.get_accelerator_ids().get("GPU", ())]

    def start(self, host: str, port: int) -> None:
        """Join the role's process group and build the role."""
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",  # Ray shows each worker only its own devices
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        join_world()
        seed_libraries(self.plan.config.seed)  # as the loop does in its process
        self.role = LocalRole(self.plan, self.role_name)

    def infer(self, packed: Mapping[str, Any], rows: list[int], names: list[str]) -> dict[str, Any]:
        """Outputs of these rows, as arrays."""
        outputs = self.role.infer(unpack(packed, rows), frozenset(names))
        return {name: values.numpy() for name, values in outputs.items()}

    def train(
        self,
        *sent: Mapping[str, Any],
        read: Mapping[str, list[str]],
        rows: Mapping[str, list[int]],
        steps: Mapping[str, StepInfo],
        sources: Mapping[str, list[Any] | None],
    ) -> tuple[dict[str, float], int, str]:
        """Optimiser steps on these rows of each credited batch; metrics, the new version, and what was said meanwhile.

        `sent` are, for each key of `read`, the columns and then the extras that it names.
        """
        work: dict[str, Batch] = {}
        arriving = iter(sent)
        for key, names in read.items():
            columns = next(arriving)
            extras = {name: next(arriving)[""] for name in names}
            work[key] = unpack(columns, rows[key], extras, steps[key], sources[key])
            work[key].world = self.role.world
        with redirect_stderr(io.StringIO()) as said:  # nobody reads a worker's
            metrics = self.role.train(work)
        return metrics, self.role.version, said.getvalue()

    def set_version(self, version: int) -> None:
        """After a restore."""
        self.role.version = version

    def open_weights(self) -> None:
        """Begin to stream the weights; every rank takes part, since sharded ones are gathered."""
        self._bucket = buckets(self.role.weights())

    def next_weights(self) -> tuple[list[tuple[str, Any]], bool]:
        """The next bucket (filled on rank 0 only), and whether another may follow."""
        assert self._bucket is not None, "open_weights comes first"
        bucket = next(self._bucket, [])
        return (bucket if self.rank == 0 else []), bool(bucket)

    def take_weights(self, bucket: list[tuple[str, Any]], decay: float, first: bool) -> None:
        """Take one bucket of another role's weights; every rank gets it and takes its share."""
        tensors = ((name, from_array(packed)) for name, packed in bucket)
        self._taken = self.role.take_weights(tensors, decay, None if first else self._taken)

    def check_weights(self) -> None:
        """After the last bucket: check that nothing was left out."""
        assert self._taken is not None, "take_weights comes first"
        self._taken.check_complete()
        self._taken = None

    def save(self, folder: str) -> None:
        """Checkpoint state of this rank, its random states too."""
        self.role.save(folder)
        write_tree(self._random(folder), [get_random_states()])

    def load(self, folder: str) -> None:
        """Restore it."""
        self.role.load(folder)
        if self._random(folder).exists():  # not where another launcher wrote the folder
            set_random_states(read_tree(self._random(folder))[0])

    def _random(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.rank}.safetensors"

    def export(self, folder: str) -> None:
        """Write the Hugging Face folder; every rank takes part."""
        self.role.export(folder)

    def sleep(self) -> int:
        """Give device memory back; its bytes."""
        return self.role.sleep()

    def wake(self) -> int:
        """Take it again; its bytes."""
        return self.role.wake()


def buckets(weights: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Any]]]:
    """`weights` in runs of about `BUCKET_BYTES`, as arrays (bfloat16 as its bits)."""
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, tensor in weights:
        bucket.append((name, to_array(tensor)))
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def to_array(tensor: Tensor) -> Any:
    """A tensor as (dtype name, array); NumPy has no bfloat16, so its bits travel as int16."""
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return str(tensor.dtype).removeprefix("torch."), bits.numpy()


def from_array(packed: Any) -> Tensor:
    """What `to_array` packed."""
    dtype, array = packed
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


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

    @cached_property
    def local(self) -> LocalRole:
        """The model itself, for engines that sample from it; built when first asked for, with what was received so far."""
        local = LocalRole(self.plan, self.name, frozen=True)
        for bucket in self._received:
            local.take_weights((name, from_array(packed)) for name, packed in bucket)
        return local

    def release(self) -> None:
        """Free the model, unless the engine samples from it or no other place has its weights."""
        if not self._sampled and not self._inside:
            self.__dict__.pop("local", None)

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
        """What the last sync brought; the initial weights before the first."""
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
        """The same, and the mirrors of the roles."""
        where = super().initialize()
        config = self.plan.config
        seed_libraries(config.seed)
        self.mirrors = {name: MirrorRole(self.plan, name) for name, spec in self.plan.roles.items() if spec.sampled}
        self.engines = Engines(config.seed, Path(config.output), self.plan)
        self.engines.bind(Placement(dict[str, Any](self.mirrors), None, World()))
        self.engine = self.engines.open(config.providers["rollout"], "rollout")
        self._received = 0
        self._compared: set[tuple[str, str]] = set()
        return where

    def sample(self, role: str, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Completions of a mirrored role."""
        rollouts: Rollouts = self.engine(self.mirrors[role], prompts, sampling)
        self._release(role, "sample")
        return rollouts

    def receive(self, role: str, bucket: list[tuple[str, Any]], first: bool) -> None:
        """One bucket of weights."""
        self._received = sum(array.nbytes for _, (_, array) in bucket) + (0 if first else self._received)
        self.mirrors[role].receive(bucket, first)

    def finish_sync(self, role: str, version: int) -> dict[str, float]:
        """All buckets are here: let the engine take them."""
        self.mirrors[role].version = version
        metrics = {"sync/bytes": float(self._received), **(self.engine.sync(self.mirrors[role]) or {})}
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
        freed: int = self.engine.sleep(level)
        return freed

    def wake(self, part: Literal["weights", "cache", "all"]) -> int:
        """Take the memory of a part again; its bytes."""
        taken: int = self.engine.wake(part)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The states of the engine and those inside it, by place."""
        return self.engines.state_dict(clone=True)

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Continue from them."""
        self.engines.load_state_dict(states)

    def close(self) -> None:
        """Free everything."""
        self.engines.close()
