"""Placement groups and actors of one run on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_core.contract.distributed import World
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import RunStopped, UsageError, WorkerLost, option, run_option
from rlhf_core.launcher.sharing import SharingOptions
from rlhf_core.models.loading.optional_imports import uses_peft
from rlhf_distributed_ray.overlap import call_chains
from rlhf_distributed_ray.placement import Layout, Seat, check_devices, total
from rlhf_distributed_ray.places import ENGINE
from rlhf_distributed_ray.pulse import GROUP, Limits
from rlhf_distributed_ray.sending import WEIGHTS
from rlhf_distributed_ray.snapshots import Keeper, Snapshots
from rlhf_distributed_ray.surroundings import Surroundings

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan
    from rlhf_distributed_ray.crew import Crew
    from rlhf_distributed_ray.group import EngineGroup, RoleGroup

__all__ = ["Cluster", "disconnect"]

T = TypeVar("T")

ATTEMPTS = 5
"""Number of restarts of a role before it counts as dead: Ray takes some seconds to notice that a node is gone."""
PACKAGES = ("rlhf-core", "torch", "transformers")
NODE = "ray.io/node-id"  # the label that Ray gives every node


class Cluster:
    """Placement groups and actors of one run.

    Args:
        plan: its roles are placed.
        layout: who sits where.
        surroundings: what the processes of workers begin with.
        limits: how long workers are waited for.
        sharing: whether those who share a device take turns on it.
        started: the cluster was started here, and ends with the run.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        surroundings: Surroundings,
        limits: Limits,
        sharing: SharingOptions,
        started: bool,
    ) -> None:
        self.plan = plan
        self.layout = layout
        self.surroundings = surroundings
        self.limits = limits
        self.sharing = sharing
        self.started = started
        self.groups: list[Any] = []
        self.actors: list[Any] = []
        self.described: Any = None
        """the run, as workers build it again"""

    def place(self) -> Placement:
        """Reserve bundles, start everyone, and hand the loop what it sees."""
        from rlhf_core.config.builder import to_names
        from rlhf_core.plugins.registry import default_registry
        from rlhf_distributed_ray.engine_worker import EngineWorker
        from rlhf_distributed_ray.group import EngineGroup
        from rlhf_distributed_ray.replacing import EngineCrew
        from rlhf_distributed_ray.sharing import RayTurns
        from rlhf_distributed_ray.transport import Shipper
        from rlhf_distributed_ray.worker import Description, RoleWorker, package_versions, versions

        self._reserve()
        config = self.plan.config
        registry = config.registry or default_registry()
        expected = versions(registry, config.names, config.uses)
        secrets = self.surroundings.secrets
        self.described = described = Description(
            registry.selection,
            to_names(config),
            expected,
            str(Path.cwd()),
            secrets,
            package_versions(_packages(self.plan)),
        )
        shipper = Shipper()
        actors = {
            role: [self._actor(RoleWorker, s, described, role, k, len(seats)) for k, s in enumerate(seats)]
            for role, seats in self.layout.seats.items()
            if role != ENGINE
        }
        if ENGINE in self.layout.seats:
            actors[ENGINE] = [self._actor(EngineWorker, seat, described) for seat in self.layout.seats[ENGINE]]
        alone = [[name] for name in actors]  # their processes come up at once, even if they share bundles
        crews = call_chains({name: partial(self._crew, _title(name), each) for name, each in actors.items()}, alone)
        engine = None
        if ENGINE in crews:
            midway = config.partial.midway
            engine = EngineGroup(EngineCrew(crews.pop(ENGINE), self.hire_engine, self.limits.retries, midway))
        for role, crew in crews.items():
            check_devices(role, crew.call("devices"))
        device_bytes = {role: min(crew.call("device_bytes")) for role, crew in crews.items()}
        self.turns = RayTurns(self.sharing, self.plan, self.layout, device_bytes)
        roles = {role: self.turns.group(role, crews[role], shipper) for role in self.plan.roles}
        call_chains({role: partial(self._load, group) for role, group in roles.items()}, self.turns.chains(list(roles)))
        return _RayPlaced(roles, engine, World(), self)

    def hire_engine(self, rank: int) -> Any:
        """Return a new actor in the seat of a rollout engine."""
        from rlhf_distributed_ray.engine_worker import EngineWorker

        self.await_room()
        return self._actor(EngineWorker, self.layout.seats[ENGINE][rank], self.described)

    def restart(self, group: RoleGroup) -> None:
        """Put new actors into the seats of a role, and let them build it."""
        import ray

        from rlhf_distributed_ray.worker import RoleWorker

        role, seats = group.name, self.layout.seats[group.name]
        for left in reversed(range(ATTEMPTS)):
            self.await_room()
            actors = [self._actor(RoleWorker, s, self.described, role, k, len(seats)) for k, s in enumerate(seats)]
            try:
                crew = self._crew(_title(role), actors)
                break
            except WorkerLost:
                for actor in actors:
                    ray.kill(actor)
                if not left:
                    raise
        group.begin_again(crew)
        check_devices(role, group.call("devices"))
        self._load(group)

    def await_room(self) -> None:
        """Wait until Ray has placed the bundles of lost nodes elsewhere.

        Raises:
            RunStopped: there is no room for them.
        """
        import ray

        ends = time.monotonic() + self.limits.room
        while any(ray.util.placement_group_table(group)["state"] != "CREATED" for group in self.groups):
            if time.monotonic() > ends:
                raise RunStopped(
                    f"a node is lost, and no other node had room for its workers within {self.limits.room:g} s; "
                    f"continue from the last checkpoint with {run_option('resume', True)}, on fewer workers or "
                    "after the node is back"
                )
            time.sleep(0.5)

    def keeper(self, node: str) -> Any:
        """Return a new keeper of snapshots on a node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node, soft=False)
        handle = ray.remote(Keeper).options(num_cpus=0, scheduling_strategy=there).remote()
        self.actors.append(handle)
        return handle

    def _load(self, group: RoleGroup) -> None:
        """Let a role's ranks load it, when there is room for it."""
        with self.turns.loading(group):
            _start(group.crew)

    def _reserve(self) -> None:
        """Placement groups for every bundle of the layout."""
        import ray

        for number, (bundles, strategy) in enumerate(zip(self.layout.groups, self.layout.strategies, strict=True)):
            avoid = sorted(set(self._nodes_of(_set_of(number, self.layout.apart))))
            where = [{NODE: f"!in({','.join(avoid)})"} for _ in bundles] if avoid else None
            group = ray.util.placement_group(
                [dict(bundle) for bundle in bundles],
                strategy=strategy,
                bundle_label_selector=where,
                _soft_target_node_id=self._emptiest(number),
            )
            self.groups.append(group)
        self._await(self.groups)

    def _emptiest(self, number: int) -> str | None:
        """Return the node with the fewest groups of those that group `number` is spread with; None leaves it to Ray.

        A node without room for it, or a lost one, is no obstacle: Ray then takes any other one.
        """
        import ray

        used = self._nodes_of(_set_of(number, self.layout.spread))
        bundles = self.layout.groups[number]
        needs = {name: total(name, bundles) for bundle in bundles for name in bundle}
        nodes = [node for node in ray.nodes() if used and node["Alive"]]
        fit = [n["NodeID"] for n in nodes if all(n["Resources"].get(name, 0) >= needs[name] for name in needs)]
        return min(sorted(fit), key=used.count, default=None)

    def _nodes_of(self, groups: frozenset[int]) -> list[str]:
        """The nodes of those of these groups that are reserved already, one a group or more."""
        import ray

        mine = [self.groups[number] for number in sorted(groups) if number < len(self.groups)]
        self._await(mine)
        tables = [ray.util.placement_group_table(group) for group in mine]
        return [node for table in tables for node in sorted(set(table["bundles_to_node_id"].values()))]

    def _await(self, groups: list[Any]) -> None:
        import ray

        if not groups:
            return
        _, waiting = ray.wait([g.ready() for g in groups], num_returns=len(groups), timeout=self.limits.placing)
        if waiting:
            raise UsageError(
                f"the cluster did not place {len(waiting)} of {len(groups)} groups of workers within "
                f"{self.limits.placing:g} s; free resources, use {option('strategy', 'PACK')}, or raise "
                f"{option('wait')}"
            )

    def _actor(self, body: type, seat: Seat, *args: Any) -> Any:
        """One actor in its seat."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        share = dict(self.layout.share(seat))
        # Ray hides the GPUs of a worker that asks for some, not of others
        hidden = {} if share.get("GPU") else {"CUDA_VISIBLE_DEVICES": ""}
        actor = ray.remote(concurrency_groups={GROUP: 1, WEIGHTS: 1})(body).options(
            num_cpus=share.pop("CPU", 0),
            num_gpus=share.pop("GPU", 0),
            memory=share.pop("memory", None),  # bytes, which Ray refuses among `resources`
            resources=share,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.groups[seat.group], seat.bundle),
            runtime_env=self.surroundings.runtime_environment(**hidden),
        )
        handle = actor.remote(*args)
        self.actors.append(handle)
        return handle

    def _crew(self, who: str, actors: list[Any]) -> Crew:
        """Return the crew of these new actors, each of which has built the plan."""
        from rlhf_distributed_ray.crew import Crew

        crew = Crew(who, actors, self.limits)
        crew.where = crew.call("initialize")
        return crew

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
            disconnect(self.started)


def _start(crew: Crew) -> None:
    """Let the ranks of a role meet, and build the role."""
    timeout = crew.limits.timeout
    host, port = crew.send(lambda actor, _: actor.open_store.remote(timeout), [0]).in_order()[0]
    crew.call("start", host, port, timeout)


def _packages(plan: Plan) -> list[str]:
    """Return the packages that every process must have in one version: those that compute, and peft if a role uses it."""
    return [*PACKAGES, *(["peft"] if any(uses_peft(spec.options) for spec in plan.roles.values()) else [])]


def _title(name: str) -> str:
    """The name of a role's workers, or of the engines, in messages."""
    return "rollout engine" if name == ENGINE else f"role {name}"


class _RayPlaced(Placement):
    """Placement that closes its cluster."""

    def __init__(
        self, groups: dict[str, RoleGroup], engines: EngineGroup | None, world: World, cluster: Cluster
    ) -> None:
        limits = cluster.limits
        rollout = cluster.turns.engine(engines) if engines is not None else None
        super().__init__(dict(groups), rollout, world, limits.retries, limits.snapshot_every)
        self.groups, self.engines, self.cluster = groups, engines, cluster
        self.snapshots = Snapshots(cluster.keeper, limits.patience)

    def keep(self, step: int, roles: Sequence[str]) -> bool:
        return self.snapshots.keep(step, {name: self.groups[name] for name in roles}, _live_nodes())

    def give_back(self, step: int, roles: Sequence[str]) -> None:
        self.snapshots.give_back(step, {name: self.groups[name] for name in roles})

    def recoveries(self) -> dict[str, float]:
        return self.engines.engines.recoveries() if self.engines is not None else {}

    def revive(self, roles: Sequence[str]) -> None:
        import ray

        doomed = [group for name, group in self.groups.items() if name in roles or not group.crew.is_whole()]
        for actor in [actor for group in doomed for actor in group.crew.actors]:
            ray.kill(actor)  # also of ranks that are alive: they may wait for a dead one, or work on what is given up
        restarts = {group.name: partial(self.cluster.restart, group) for group in doomed}
        call_chains(restarts, self.cluster.turns.chains(list(restarts)))
        self.snapshots.forget(_live_nodes())
        if self.engines is not None:
            self.engines.engines.forget_weights()

    def together(self, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Roles with their own bundles work at the same time; those that share one work in turn."""
        return call_chains(calls, self.cluster.layout.chains(calls))

    def metrics(self) -> Mapping[str, float]:
        return self.cluster.turns.metrics()

    def close(self) -> None:
        if self.engines is not None:
            self.engines.end()
        self.cluster.close()


def _set_of(number: int, sets: Iterable[frozenset[int]]) -> frozenset[int]:
    """Return the set that group `number` is in; empty if it is in none."""
    return next((each for each in sets if number in each), frozenset())


def _live_nodes() -> list[str]:
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def disconnect(started: bool) -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    if started:
        ray.shutdown()
