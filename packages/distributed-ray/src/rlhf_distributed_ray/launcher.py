"""The launcher `ray`: one controller runs the loop, roles and rollout engines are groups of actors on a cluster.

Works against a cluster it starts on this machine, and against an existing one (`--launcher.address`). A run survives the death
of workers and nodes (`cluster`), and roles and engines may take turns on a device (`sharing`).
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.providers import Launcher
from rlhf_core.contract.ranges import at_least
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import MissingPackage, OptionError, option
from rlhf_core.launcher.sharing import SharingOptions
from rlhf_core.lazy import torch
from rlhf_core.util.messages import progress
from rlhf_distributed_ray.cluster import Cluster, disconnect
from rlhf_distributed_ray.drawing import draw_layout, forecast_memory
from rlhf_distributed_ray.placement import Layout, check_capacity, find_lack, lay_out
from rlhf_distributed_ray.places import ENGINE, Place, Shape, check_engines_alone, parse_places, parse_shape
from rlhf_distributed_ray.pulse import Limits
from rlhf_distributed_ray.surroundings import Surroundings, read_runtime_environment, travelling_variables

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan

__all__ = ["RayLauncher"]

LOWEST = (2, 50)
KNOCK_SECONDS = 5
SMALLEST_SHARE = 0.0001  # of a CPU; a bundle of nothing is none
PLACING_SECONDS = 60.0  # an idle cluster places a group in well under a second
REASON = 150  # characters of Ray's message: a line


@dataclass(frozen=True)
class RayLauncher(SharingOptions, Launcher):
    """Roles and rollout engines as groups of Ray actors."""

    engines_apart: ClassVar[bool] = True
    """engines are processes with their own weights, so that they sample while roles train"""
    brings_weights_midway: ClassVar[bool] = True
    """weights come to an engine in another thread than calls"""

    address: str = ""
    """cluster to join, `auto` or `ray://…`; empty starts one on this machine and stops it at the end"""
    workers: str = "1"
    """number of workers of each role, each on its own GPU: a number, or NODESxDEVICES, whose devices Ray keeps on one
    node"""
    role_workers: tuple[str, ...] = ()
    """roles with their own number of workers, such as `critic=2` or `actor=2x4`; if separate also with their own
    placement, such as `actor=2x4:STRICT_SPREAD`"""
    engines: int = 0
    """number of rollout engines; 0 takes one for each worker of the sampled role, or one for each set of GPUs that an
    engine needs. With servers that take weights (--rollout.server) there is one"""
    place: str = "together"
    """placement of workers: `together` puts rank k of every role, and engine k, into bundle k; `separate` gives each
    its own bundles; or a partition such as `actor+reference@8,critic@4:SPREAD,engine@4,RAM=64`, which states the roles
    that share bundles, their number, strategy and resources"""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy for bundles over nodes"""
    cpus: float = 0.25
    """CPUs that a worker requests; less than 1 is usual, since roles work in turn"""
    gpus: Literal["auto", "on", "off"] = "auto"
    """use of GPUs: `on` gives each bundle a GPU, which its workers share; `off` computes on the CPU; `auto` is on if
    the cluster has a GPU"""
    threads: int = 1
    """number of OpenMP threads of each worker"""
    patience: float = 120.0
    """seconds without a sign of life after which a worker in a call counts as dead and is killed"""
    stall: float = 1800.0
    """seconds without progress in a call after which a worker counts as dead; the limit is at least ten times the
    longest call so far"""
    timeout: float = 1800.0
    """seconds that the ranks of a role wait for each other in a collective operation"""
    retries: int = 8
    """number of dead workers that are replaced, counted for roles and for rollout engines separately; a further death
    ends the run"""
    snapshot_every: int = 0
    """steps between two snapshots of trained roles in the memory of two nodes, from which the run continues after a
    death; 0 continues from the last checkpoint"""
    room: float = 600.0
    """seconds that the run waits for resources for its workers after the loss of a node"""
    wait: float = 0.0
    """seconds to wait for a cluster that grows on demand; 0 refuses resources that are missing now"""
    env: tuple[str, ...] = ()
    """environment variables to pass to workers, in addition to those whose names begin with HF_, NCCL_, GLOO_, VLLM_,
    TORCH_, PYTORCH_"""
    runtime_env: str = ""
    """YAML or JSON file with a Ray runtime environment for all workers"""
    show_placement: bool = False
    """print the placement of all workers with their calculated memory before the run starts; with --dry-run nothing
    starts"""

    def check(self) -> None:
        """Raise UsageError if Ray is missing or too old."""
        if find_spec("ray") is None:
            raise MissingPackage("launcher 'ray' needs ray: python3 -m pip install 'rlhf-distributed-ray[ray]'")
        found = _ray_version()
        if found < LOWEST:
            raise MissingPackage(
                f"ray {'.'.join(map(str, found))} is too old: python3 -m pip install --upgrade 'rlhf-distributed-ray[ray]'"
            )

    def __call__(self, plan: Plan) -> Placement:
        places = self._places(plan)
        variables, secrets = travelling_variables(os.environ, self.env)
        runtime = read_runtime_environment(self.runtime_env)
        started = self._connect(runtime)
        try:
            layout = self._lay_out(places)
            _report_engines(layout)
            # what the whole job has needs no repeating, but for variables: those of a worker count more than the job's
            kept = {"env_vars": runtime.get("env_vars", {})} if started else runtime
            surroundings = Surroundings(self.threads, variables, secrets, kept)
            limits = Limits(
                patience=self.patience,
                stall=self.stall,
                timeout=self.timeout,
                placing=max(self.wait, PLACING_SECONDS),
                retries=self.retries,
                room=self.room,
                snapshot_every=self.snapshot_every,
            )
            cluster = Cluster(plan, layout, surroundings, limits, self, started)
        except BaseException:
            disconnect(started)
            raise
        try:
            return cluster.place()
        except BaseException:
            cluster.close()
            raise

    def check_plan(self, plan: Plan) -> None:
        """Check that the options give every role of the plan a place; draw the places if asked."""
        places = self._places(plan)
        if self.show_placement:
            layout = lay_out(places, self.cpus, self.gpus != "off" and (bool(self.address) or _has_gpu()))
            held = forecast_memory(plan.config, layout, _sampled_role(plan))
            progress.info(draw_layout(layout, held))

    def _places(self, plan: Plan) -> list[Place]:
        """Return the groups of roles and engines that share bundles.

        Raises:
            UsageError: options contradict each other.
        """
        self._check_numbers()
        sampled = _sampled_role(plan)
        rollout = plan.config.providers["rollout"] if sampled else None
        devices, single = (rollout.devices, rollout.single_engine) if rollout is not None else (1, False)
        if self.place in ("together", "separate"):
            places = self._usual_places(plan, sampled, devices, self.engines or int(single))
        else:
            if self.workers != "1" or self.role_workers:
                other = "role_workers" if self.role_workers else "workers"
                raise OptionError(
                    ["place", other],
                    "contradict each other: the sizes in a placement already set the workers; leave one out",
                )
            places = parse_places(self.place, list(plan.roles), sampled, self.strategy, devices)
            places = [_with_engines(place, self.engines) for place in places]
        for place in places:
            if self.gpus != "off":
                check_engines_alone(place, devices)
            if single and place.members.get(ENGINE, Shape(1)).workers > 1:
                raise OptionError(
                    "engines",
                    f"{place.members[ENGINE].workers} is not supported by rollout {plan.config.names.get('rollout', '')!r} "
                    "with these options, because engines would overwrite each other's weights at the servers; pass "
                    f"{option('engines', 1)}",
                )
        return places

    def _check_numbers(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.engines < 0:
            raise OptionError(
                "engines", f"{self.engines}: must be at least 1, or 0 for one engine per worker of the sampled role"
            )
        for name in ("patience", "stall", "timeout", "room"):
            if not (seconds := vars(self)[name]) > 0:
                raise OptionError(name, f"{seconds:g}: give a number of seconds above 0")
        if not SMALLEST_SHARE <= self.cpus < float("inf"):
            raise OptionError(
                "cpus", f"{self.cpus:g}: give at least {SMALLEST_SHARE:g}, the smallest share that Ray counts"
            )
        at_least(0, self, "retries", "snapshot_every", "wait")
        at_least(1, self, "threads")

    def _usual_places(self, plan: Plan, sampled: str, devices: int, engines: int) -> list[Place]:
        """The one place of `together`, or the places of `separate`; 0 `engines` follow the sampled role's workers."""
        members = self._shapes(plan)
        if sampled:
            members[ENGINE] = Shape(engines or max(1, members[sampled].workers // devices))
        if self.place == "together":
            return [Place(members, self.strategy)]
        return [
            Place({name: shape}, shape.strategy or self.strategy, devices=devices if name == ENGINE else 1)
            for name, shape in members.items()
        ]

    def _shapes(self, plan: Plan) -> dict[str, Shape]:
        """Workers of each role of the plan."""
        shapes = dict.fromkeys(plan.roles, self._shape(self.workers, "workers"))
        for text in self.role_workers:
            role = text.partition("=")[0]
            if role not in shapes:
                raise OptionError(
                    "role_workers", f"{text!r}: this run has no role {role!r}; it has {', '.join(shapes)}"
                )
            shapes[role] = self._shape(text, "role_workers")
        return shapes

    def _shape(self, text: str, field: str) -> Shape:
        """The workers that `2x4`, or `actor=2x4` of `role_workers`, gives a role."""
        shape = parse_shape(text.partition("=")[2] if field == "role_workers" else text, field)
        if shape.strategy and self.place == "together":
            raise OptionError(
                field,
                f"{text!r}: roles that share a place must have the same layout; use {option('strategy')}, or "
                f"{option('place', 'separate')}",
            )
        return shape

    def _lay_out(self, places: list[Place]) -> Layout:
        """The layout on the cluster that this process has joined, which can hold it."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = self.gpus == "on" or (self.gpus == "auto" and any(node.get("GPU") for node in nodes))
        layout = lay_out(places, self.cpus, gpus)
        if not self.wait:
            check_capacity(layout, nodes)
        elif lack := find_lack(layout, nodes):
            progress.info(f"{lack}; waiting up to {self.wait:g} s for the cluster to grow")
        return layout

    def _connect(self, runtime: Mapping[str, Any]) -> bool:
        """Join or start a cluster, with a runtime environment for its workers; whether it was joined or started here."""
        import ray

        started = not ray.is_initialized()
        if started:
            _is_listening(self.address)
            self._open(runtime)
        return started

    def _open(self, runtime: Mapping[str, Any]) -> None:
        """Call `ray.init`; every failure becomes a one-line error."""
        import ray

        with _capture_stderr() as said:
            try:
                ray.init(
                    address=self.address or "local",
                    log_to_driver=False,
                    include_dashboard=False if not self.address else None,
                    logging_level="ERROR",
                    runtime_env=dict(runtime) or None,
                )
                return
            except Exception as error:  # of any type: a node that does not start in time is a bare one
                reason = " ".join(str(error).split())[:REASON] or type(error).__name__
                refused = isinstance(error, ray.exceptions.AuthenticationError)
        if refused or b"Unauthenticated" in said:
            raise OptionError(
                "address",
                f"{self.address}: the cluster rejects this token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) to the values of the cluster",
            )
        raise OptionError("address", f"{self.address or 'local'}: no Ray cluster answers ({reason})")


def _sampled_role(plan: Plan) -> str:
    """The role whose workers decide how many engines there are: the policy if it is sampled; empty in an offline run."""
    sampled = [role for role, spec in plan.roles.items() if spec.sampled] if plan.online else []
    return plan.policy if plan.policy in sampled else next(iter(sampled), "")


def _has_gpu() -> bool:
    """Return True if this machine has a GPU, which a cluster that starts on it has too."""
    return bool(torch.cuda.is_available())


def _with_engines(place: Place, engines: int) -> Place:
    """`place` with that many engines, where it has any and a number is given."""
    if not engines or ENGINE not in place.members:
        return place
    room = place.members[ENGINE].workers
    if engines > room:
        raise OptionError(
            ["place", "engines"], f"contradict each other: the placement has room for {room} rollout engines"
        )
    return replace(place, members={**place.members, ENGINE: Shape(engines)})


def _report_engines(layout: Layout) -> None:
    """Log how many engines there are, and with whom they share their bundles."""
    seats = layout.seats.get(ENGINE, ())
    if len(seats) > 1:
        others = [name for name in layout.sitting(seats[0]) if name != ENGINE]
        where = f"beside {', '.join(others)}" if others else "in separate bundles"
        progress.info(f"{len(seats)} rollout engines {where}")


def _ray_version() -> tuple[int, ...]:
    """Return Ray's version; an unknown one counts as new."""
    try:
        return tuple(int(part) for part in version("ray").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return LOWEST


@contextmanager
def _capture_stderr() -> Iterator[bytearray]:
    """Keep what this process writes to standard error in the meantime: Ray warns there every second
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
    """Raise UsageError if nothing listens at `host:port`. Ray itself tries such an address for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():
        return  # empty, `auto`, or a name that Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OptionError("address", f"{address}: no Ray cluster answers ({error})") from None
