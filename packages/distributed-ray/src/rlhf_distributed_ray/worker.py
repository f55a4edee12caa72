"""Code inside a Ray actor that is one rank of a role. It asks Ray only for a node's address and devices, so
that it can be read and tested as plain Python; `launcher` turns the classes into actors."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.registry_view import PluginSelection
from rlhf_core.errors import UsageError
from rlhf_core.launcher.local import join_world
from rlhf_core.lazy import torch
from rlhf_core.training.local_role import LocalRole
from rlhf_core.training.planner import make_plan
from rlhf_core.training.taken_weights import TakenWeights
from rlhf_core.util.activity import report
from rlhf_core.util.messages import install_console
from rlhf_core.util.random_states import get_random_states, seed_libraries, set_random_states
from rlhf_core.util.tensor_tree import read_tree, write_tree
from rlhf_distributed_ray.arrays import buckets, from_array
from rlhf_distributed_ray.pulse import Beating
from rlhf_distributed_ray.sending import WEIGHTS, Shipment, narrow, send_weights
from rlhf_distributed_ray.snapshots import Files, memory_folder, read_files, write_files
from rlhf_distributed_ray.transport import unpack

__all__ = ["Description", "RoleWorker", "Worker", "package_versions", "plan_from", "versions"]


@dataclass(frozen=True)
class Description:
    """The run as it travels to a worker: names and options, and never functions."""

    plugins: PluginSelection
    """plugins that are loaded there, including those of `-p`"""
    names: Mapping[str, Any]
    """the configuration, as `to_names` gives it"""
    versions: Mapping[str, str]
    """distribution and version of each provider, as the controller has them"""
    folder: str
    """folder in which the run was started: relative paths refer to it, and local modules are in it"""
    secrets: Mapping[str, str] = field(repr=False, default_factory=dict)
    """environment variables of the controller that Ray must not show"""
    packages: Mapping[str, str] = field(default_factory=dict)
    """versions of the libraries that decide numbers, as the controller has them (`package_versions`)"""


def plan_from(run: Description) -> Plan:
    """The controller's plan, built again from names and options with the plugins of this process.

    Raises:
        UsageError: this process has other packages or plugins than the controller.
    """
    from rlhf_core.config.builder import from_names
    from rlhf_core.plugins.registry import Registry

    _check_packages(run.packages)
    chosen = run.plugins
    registry = Registry(autoload=chosen.autoload, blocked=chosen.blocked, load=chosen.load)
    config = from_names(run.names, registry)
    mine, expected = versions(registry, config.names, config.uses), run.versions
    if mine != expected:
        differing = sorted(kind for kind in {*mine, *expected} if mine.get(kind) != expected.get(kind))
        pairs = ", ".join(f"{kind}: {expected.get(kind)} here, {mine.get(kind)} there" for kind in differing)
        raise UsageError(
            f"the plugins on {socket.gethostname()} differ from the controller's ({pairs}); install the same versions"
        )
    return make_plan(config)


def versions(registry: Any, names: Mapping[str, str], uses: Mapping[str, str]) -> dict[str, str]:
    """Distribution and version behind each chosen provider, by kind; of optimizers, by role (`actor.optim`)."""
    found = {kind: registry.provenance(kind, name) for kind, name in names.items() if isinstance(name, str)}
    found |= {path: registry.provenance("optimizer", name) for path, name in uses.items()}
    return {
        kind: " ".join(map(str, source)) if isinstance(source, tuple) else str(source) for kind, source in found.items()
    }


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each package, `none` where it is missing. Builds of a version, such as `+cpu`, count as one."""
    found = {}
    for name in names:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _check_packages(expected: Mapping[str, str]) -> None:
    """Check that this process has the controller's packages, before it reads the run with them.

    Raises:
        UsageError: it has others.
    """
    mine = package_versions(expected)
    differing = [name for name in expected if mine[name] != expected[name]]
    if differing:
        pairs = ", ".join(f"{name}: {expected[name]} here, {mine[name]} there" for name in differing)
        raise UsageError(
            f"packages of {socket.gethostname()} differ from the controller's ({pairs}); install the same versions"
        )


class Worker(Beating):
    """A process of the run: what all kinds of it do first.

    Nothing can fail while it is made: Ray reports an error there as a death.
    """

    def __init__(self, run: Description) -> None:
        super().__init__()
        self._run = run

    def initialize(self) -> tuple[str, int]:
        """Go to the folder that the run was started in, whose relative paths are meant, and build the plan; host name and
        process id, for messages.

        Raises:
            UsageError: that folder is not here, or other plugins are.
        """
        try:
            os.chdir(self._run.folder)
        except OSError as error:
            raise UsageError(
                f"node {socket.gethostname()} has no folder {self._run.folder} ({error.strerror}); start the run in a folder "
                "that all nodes see"
            ) from None
        os.environ.update(self._run.secrets)
        install_console()
        self.count_progress()
        self.plan = plan_from(self._run)
        return socket.gethostname(), os.getpid()


class RoleWorker(Worker):
    """Rank `rank` of the `size` workers of a role."""

    def __init__(self, run: Description, role: str, rank: int, size: int) -> None:
        super().__init__(run)
        self.role_name, self.rank, self.size = role, rank, size
        self._bucket: Iterator[list[tuple[str, Any]]] | None = None
        self._taken: TakenWeights | None = None
        self._store: Any = None
        """store in which the ranks meet, on rank 0"""

    def open_store(self, timeout: float) -> tuple[str, int]:
        """Open the place where the ranks meet, on a port that the system gives; return its address as the cluster knows it."""
        import ray

        host = ray.util.get_node_ip_address()
        self._store = _store(host, 0, self.size, True, timeout)
        return host, self._store.port

    def devices(self) -> list[tuple[str, str]]:
        """The GPUs this worker was given, each with its node."""
        import ray

        context = ray.get_runtime_context()
        return [(context.get_node_id(), each) for each in context.get_accelerator_ids().get("GPU", ())]

    def device_bytes(self) -> int:
        """Memory of the GPU that this worker was given; 0 without one."""
        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0

    def start(self, host: str, port: int, timeout: float) -> None:
        """Join the role's process group, whose ranks meet at this address, and build the role."""
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",  # Ray shows each worker only its own devices
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        store = self._store or (_store(host, port, self.size, False, timeout) if self.size > 1 else None)
        join_world(timeout, store)
        seed_libraries(self.plan.config.seed)  # as the loop does in its process
        self.role = LocalRole(self.plan, self.role_name)

    def infer(self, packed: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """Outputs of these rows, as arrays."""
        outputs = self.role.infer(unpack(packed), frozenset(names))
        return {name: values.numpy() for name, values in outputs.items()}

    def train(
        self,
        *sent: Mapping[str, Any],
        read: Mapping[str, list[str]],
        steps: Mapping[str, StepInfo],
        sources: Mapping[str, list[Any] | None],
    ) -> tuple[dict[str, float], int, str]:
        """Take optimizer steps on this rank's rows of each credited batch; return metrics, the new version, and messages.

        `sent` are, for each key of `read`, the columns and then the extras that it names.
        """
        work: dict[str, Batch] = {}
        arriving = iter(sent)
        for key, names in read.items():
            columns = next(arriving)
            extras = {name: next(arriving)[""] for name in names}
            work[key] = unpack(columns, extras, steps[key], sources[key])
            work[key].world = self.role.world
        with redirect_stderr(io.StringIO()) as said:  # a worker's is not read
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

    def send_weights(self, engines: list[Any], sync: int, patience: float) -> Shipment:
        """Send the weights to these engines, from rank 0; the other ranks take part where weights are gathered.

        Only rank 0 copies them to the host, in the dtype in which engines hold them.
        """
        if self.rank == 0:
            held = (
                self.plan.config.providers["rollout"].weight_dtype
                or self.plan.roles[self.role_name].options.compute_dtype
            )
            weights = narrow(self.role.weights(), getattr(torch, held))
            group = WEIGHTS if self.plan.config.partial.midway else None
            return send_weights(weights, engines, self.role_name, sync, patience, group)
        if self.role.trainable.sharded:
            for _ in self.role.weights():
                report("gathering weights")
        return Shipment()

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

    def keep_state(self) -> tuple[Files, str]:
        """Return the files that `save` would write, and the id of this node."""
        import ray

        with memory_folder() as folder:
            self.save(folder)
            return read_files(folder), ray.get_runtime_context().get_node_id()

    def load_state(self, *parts: Files) -> None:
        """Restore what `keep_state` of every rank returned."""
        with memory_folder() as folder:
            for files in parts:
                write_files(folder, files)
            self.load(folder)

    def export(self, folder: str) -> None:
        """Write the Hugging Face folder; every rank takes part."""
        self.role.export(folder)

    def sleep(self) -> int:
        """Give device memory back; its bytes."""
        return self.role.sleep()

    def wake(self) -> int:
        """Take it again; its bytes."""
        return self.role.wake()


def _store(host: str, port: int, size: int, opens: bool, timeout: float) -> Any:
    """Return torch's store at this address: the one that answers there, or the one that asks it."""
    seconds = timedelta(seconds=timeout)
    return torch.distributed.TCPStore(host, port, size, opens, seconds, wait_for_workers=False)  # type: ignore[attr-defined]
