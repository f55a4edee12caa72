"""The launcher `ray`: one controller runs the loop, roles and rollout engines are groups of actors on a cluster.

Works against a cluster it starts on this machine, and against an existing one (`--launcher.address`). Not here yet: the
hybrid engine's sleeping and waking, and living on after a death without a restart.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.distributed import World
from rlhf_core.contract.providers import Launcher
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import MissingPackage, OptionError, UsageError, option, run_option
from rlhf_core.util.messages import log
from rlhf_distributed_ray.placement import Layout, Seat, Shape, check_capacity, check_devices, lay_out, parse_shape

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan

__all__ = ["RayLauncher"]

LOWEST = (2, 50)
KNOCK_SECONDS = 5
REASON = 150  # characters of what Ray says: a line
NODE = "ray.io/node-id"  # the label that Ray gives every node
PLACEMENT_SECONDS = 60  # an idle cluster places a group in well under a second
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # spinning threads of two busy processes slow each other fivefold


@dataclass(frozen=True)
class RayLauncher(Launcher):
    """Roles and rollout engines as groups of Ray actors."""

    engines_apart: ClassVar[bool] = True
    """engines are processes with weights of their own, so that they sample while roles train"""

    address: str = ""
    """cluster to join, `auto` or `ray://…`; empty starts one on this machine and stops it at the end"""
    workers: str = "1"
    """workers of each role, each on a GPU of its own: a number, or NODESxDEVICES, whose devices Ray keeps on one node"""
    role_workers: tuple[str, ...] = ()
    """roles with workers of their own, as `critic=2` or `actor=2x4`, when separate also laid out their own way, as
    `actor=2x4:STRICT_SPREAD`"""
    engines: int = 1
    """rollout engines"""
    placement: Literal["together", "separate"] = "together"
    """rank k of every role and the engines share bundle k, or each has bundles of its own"""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """how Ray lays bundles over nodes"""
    cpus: float = 0.25
    """CPUs that a worker asks for; a share, since roles work in turn"""
    gpus: float = 0.0
    """GPUs that a worker asks for: a share such as 0.3 lets rank k of every role, and engine k, be on one GPU; with 0 all
    workers compute on the CPU"""
    threads: int = 1
    """OpenMP threads of each worker"""

    def check(self) -> None:
        """Whether Ray is installed, and new enough."""
        if find_spec("ray") is None:
            raise MissingPackage("launcher 'ray' needs ray: python3 -m pip install 'rlhf-distributed-ray[ray]'")
        found = _ray_version()
        if found < LOWEST:
            raise MissingPackage(
                f"ray {'.'.join(map(str, found))} is too old: python3 -m pip install --upgrade 'rlhf-distributed-ray[ray]'"
            )

    def __call__(self, plan: Plan) -> Placement:
        shapes = self._shapes(plan)
        engines = self.engines if plan.online else 0
        layout = lay_out(shapes, engines, self.placement == "together", self.cpus, self.gpus, self.strategy)
        cluster = _Cluster(self, plan, layout, self._connect(layout))
        try:
            return cluster.place()
        except BaseException:
            cluster.close()
            raise

    def _shapes(self, plan: Plan) -> dict[str, Shape]:
        """Workers of each role of the plan."""
        shapes = dict.fromkeys(plan.roles, parse_shape(self.workers, "workers"))
        for text in self.role_workers:
            role, _, shape = text.partition("=")
            if role not in shapes:
                raise OptionError(
                    "role_workers", f"{text!r}: this run has no role {role!r}; it has {', '.join(shapes)}"
                )
            shapes[role] = parse_shape(shape, "role_workers")
            if shapes[role].strategy and self.placement == "together":
                raise OptionError(
                    "role_workers",
                    f"{text!r}: roles that are placed together are laid out together; "
                    f"use {option('strategy')}, or {option('placement', 'separate')}",
                )
        if self.engines < 1:
            raise OptionError("engines", f"{self.engines}: at least 1")
        for role, laid in shapes.items():
            if plan.config.batch_size % laid.workers:
                raise OptionError(
                    "/batch_size",
                    f"{plan.config.batch_size} does not divide over the {laid.workers} workers of role {role}",
                )
        return shapes

    def _connect(self, layout: Layout) -> bool:
        """Join or start a cluster, and check that it can hold the layout; whether it was started here."""
        import ray

        started = not ray.is_initialized()
        if started:
            _is_listening(self.address)
            self._open()
        try:
            check_capacity(layout, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        except UsageError:
            _disconnect(started)
            raise
        return started

    def _open(self) -> None:
        """`ray.init`, whose every failure is one line."""
        import ray

        with _capture_stderr() as said:
            try:
                ray.init(
                    address=self.address or "local",
                    log_to_driver=False,
                    include_dashboard=False if not self.address else None,
                    logging_level="ERROR",
                )
                return
            except Exception as error:  # of any type: a node that does not start in time is a bare one
                reason = " ".join(str(error).split())[:REASON] or type(error).__name__
                refused = isinstance(error, ray.exceptions.AuthenticationError)
        if refused or b"Unauthenticated" in said:
            raise OptionError(
                "address",
                f"{self.address}: the cluster refuses this token; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as the cluster has them",
            )
        raise OptionError("address", f"{self.address or 'local'}: no Ray cluster answers ({reason})")


def _ray_version() -> tuple[int, ...]:
    """Ray's version; one that does not say is taken for new."""
    try:
        return tuple(int(part) for part in version("ray").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return LOWEST


@contextmanager
def _capture_stderr() -> Iterator[bytearray]:
    """What is written to standard error meanwhile, by any code of this process, is kept instead: Ray warns there every second
    of an address that it cannot join."""
    said = bytearray()
    with tempfile.TemporaryFile() as file:
        standard_error = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)
            file.seek(0)
            said += file.read()


def _is_listening(address: str) -> None:
    """Whether something listens at `host:port`; Ray itself tries an address that is not there for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():
        return  # empty, `auto`, or a name that Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OptionError("address", f"{address}: no Ray cluster answers ({error})") from None


def _disconnect(started: bool) -> None:
    import ray

    if started:
        ray.shutdown()


class _Cluster:
    """Placement groups and actors of one run."""

    def __init__(self, options: RayLauncher, plan: Plan, layout: Layout, started: bool) -> None:
        self.options = options
        self.plan = plan
        self.layout = layout
        self.started = started
        self.groups: list[Any] = []
        self.actors: list[Any] = []

    def place(self) -> Placement:
        """Reserve bundles, start everyone, and hand the loop what it sees."""
        from rlhf_core.config.builder import to_names
        from rlhf_core.plugins.registry import default_registry
        from rlhf_distributed_ray.group import EngineGroup, RoleGroup
        from rlhf_distributed_ray.transport import Shipper
        from rlhf_distributed_ray.worker import Description, EngineWorker, RoleWorker, versions

        self._reserve()
        self._report_idle_gpus()
        config = self.plan.config
        registry = config.registry or default_registry()
        expected = versions(registry, config.names, config.uses)
        described = Description(registry.selection, to_names(config), expected, str(Path.cwd()))
        shipper = Shipper()
        roles: dict[str, RoleGroup] = {}
        for role, spec in self.plan.roles.items():
            seats = self.layout.seats[role]
            actors = [self._actor(RoleWorker, s, described, role, k, len(seats)) for k, s in enumerate(seats)]
            roles[role] = RoleGroup(
                spec, actors, self._locations(f"role {role}", actors), shipper, self.plan.config.output
            )
            check_devices(role, roles[role].call("devices"))
        engine = None
        if "engine" in self.layout.seats:
            actors = [self._actor(EngineWorker, seat, described) for seat in self.layout.seats["engine"]]
            engine = EngineGroup(actors, self._locations("rollout engine", actors))
        for group in roles.values():
            group.call("start", *group.call("address")[0])
        return _RayPlaced(dict(roles), engine, World(), self)

    def _reserve(self) -> None:
        """Placement groups for every bundle of the layout."""
        import ray

        for number, (bundles, strategy) in enumerate(zip(self.layout.groups, self.layout.strategies, strict=True)):
            avoid = self._nodes_of(next((each for each in self.layout.apart if number in each), frozenset()))
            where = [{NODE: f"!in({','.join(avoid)})"} for _ in bundles] if avoid else None
            group = ray.util.placement_group([dict(b) for b in bundles], strategy=strategy, bundle_label_selector=where)
            self.groups.append(group)
        self._await(self.groups)

    def _nodes_of(self, groups: frozenset[int]) -> list[str]:
        """The nodes that those of these groups which are reserved already are on."""
        import ray

        mine = [self.groups[number] for number in sorted(groups) if number < len(self.groups)]
        self._await(mine)
        tables = [ray.util.placement_group_table(group) for group in mine]
        return sorted({node for table in tables for node in table["bundles_to_node_id"].values()})

    def _await(self, groups: list[Any]) -> None:
        import ray

        if not groups:
            return
        _, waiting = ray.wait([g.ready() for g in groups], num_returns=len(groups), timeout=PLACEMENT_SECONDS)
        if waiting:
            raise UsageError(
                f"the cluster did not place {len(waiting)} of {len(groups)} groups of workers in {PLACEMENT_SECONDS} s; "
                f"free resources, or use {option('strategy', 'PACK')}"
            )

    def _report_idle_gpus(self) -> None:
        """GPUs that nobody asks for are not used, which is hardly meant."""
        import ray

        idle = ray.cluster_resources().get("GPU", 0.0)
        if idle and not self.options.gpus:
            gpus = self.plan.config.option_names.render(run_option("launcher.gpus"))
            log.warning(f"the cluster has {idle:g} GPUs and {gpus} is 0, so all workers compute on the CPU")

    def _actor(self, body: type, seat: Seat, *args: Any) -> Any:
        """One actor in its seat."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        share = self.layout.share
        environment = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(self.options.threads)}
        if not share.get("GPU"):
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides the GPUs of a worker that asks for some, not of others
        environment |= {k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "DS_ACCELERATOR", "HF_HUB_OFFLINE")}
        actor = ray.remote(body).options(
            num_cpus=share["CPU"],
            num_gpus=share.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.groups[seat.group], seat.bundle),
            runtime_env={"env_vars": environment},
        )
        handle = actor.remote(*args)
        self.actors.append(handle)
        return handle

    def _locations(self, who: str, actors: list[Any]) -> list[tuple[str, int]]:
        from rlhf_distributed_ray.group import gather_results

        return gather_results(who, [], [actor.initialize.remote() for actor in actors])

    def close(self) -> None:
        """End the actors, give the bundles back, stop a cluster that was started here; a cluster may be gone by then."""
        import ray

        try:
            with suppress(ray.exceptions.RayError):
                for actor in self.actors:
                    ray.kill(actor)
                for group in self.groups:
                    ray.util.remove_placement_group(group)
        finally:
            _disconnect(self.started)


class _RayPlaced(Placement):
    """What is placed, with the cluster to close."""

    def __init__(self, roles: dict[str, Any], rollout: Any, world: World, cluster: _Cluster) -> None:
        super().__init__(roles, rollout, world)
        self.cluster = cluster

    def close(self) -> None:
        self.cluster.close()
