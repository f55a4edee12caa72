"""The launcher `ray`: one controller runs the loop, roles and rollout engines are groups of actors on a cluster.

Works against a cluster it starts on this machine, and against an existing one (`--launcher.address`). Not here yet: the
hybrid engine's sleeping and waking, and living on after a death without a restart.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_core.contract.providers import Launcher
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import MissingPackage, OptionError, UsageError, option, run_option
from rlhf_core.util.messages import log
from rlhf_distributed_ray.cluster import Cluster, disconnect
from rlhf_distributed_ray.placement import Layout, Shape, check_capacity, lay_out, parse_shape

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan

__all__ = ["RayLauncher"]

LOWEST = (2, 50)
KNOCK_SECONDS = 5
REASON = 150  # characters of what Ray says: a line


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
        started = self._connect(layout)
        self._report_idle_gpus(plan)
        cluster = Cluster(plan, layout, self.threads, started)
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
            disconnect(started)
            raise
        return started

    def _report_idle_gpus(self, plan: Plan) -> None:
        """GPUs that nobody asks for are not used, which is hardly meant."""
        import ray

        idle = ray.cluster_resources().get("GPU", 0.0)
        if idle and not self.gpus:
            gpus = plan.config.option_names.render(run_option("launcher.gpus"))
            log.warning(f"the cluster has {idle:g} GPUs and {gpus} is 0, so all workers compute on the CPU")

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
