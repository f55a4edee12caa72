"""Placement groups and actors of one run on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_core.contract.distributed import World
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import UsageError, option
from rlhf_distributed_ray.overlap import call_chains
from rlhf_distributed_ray.placement import Layout, Seat, check_devices
from rlhf_distributed_ray.places import ENGINE
from rlhf_distributed_ray.pulse import GROUP, Limits
from rlhf_distributed_ray.surroundings import Surroundings

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan
    from rlhf_distributed_ray.crew import Crew

__all__ = ["Cluster", "disconnect"]

T = TypeVar("T")

NODE = "ray.io/node-id"  # the label that Ray gives every node


class Cluster:
    """Placement groups and actors of one run.

    Args:
        plan: its roles are placed.
        layout: who sits where.
        surroundings: what the processes of workers begin with.
        limits: how long workers are waited for.
        started: the cluster was started here, and ends with the run.
    """

    def __init__(self, plan: Plan, layout: Layout, surroundings: Surroundings, limits: Limits, started: bool) -> None:
        self.plan = plan
        self.layout = layout
        self.surroundings = surroundings
        self.limits = limits
        self.started = started
        self.groups: list[Any] = []
        self.actors: list[Any] = []

    def place(self) -> Placement:
        """Reserve bundles, start everyone, and hand the loop what it sees."""
        from rlhf_core.config.builder import to_names
        from rlhf_core.plugins.registry import default_registry
        from rlhf_distributed_ray.engine_worker import EngineWorker
        from rlhf_distributed_ray.group import EngineGroup, RoleGroup
        from rlhf_distributed_ray.transport import Shipper
        from rlhf_distributed_ray.worker import Description, RoleWorker, versions

        self._reserve()
        config = self.plan.config
        registry = config.registry or default_registry()
        expected = versions(registry, config.names, config.uses)
        secrets = self.surroundings.secrets
        described = Description(registry.selection, to_names(config), expected, str(Path.cwd()), secrets)
        shipper = Shipper()
        actors = {
            role: [self._actor(RoleWorker, s, described, role, k, len(seats)) for k, s in enumerate(seats)]
            for role, seats in self.layout.seats.items()
            if role != ENGINE
        }
        if ENGINE in self.layout.seats:
            actors[ENGINE] = [self._actor(EngineWorker, seat, described) for seat in self.layout.seats[ENGINE]]
        alone = [[name] for name in actors]  # their processes come up at once, whoever shares bundles
        crews = call_chains({name: partial(self._crew, _title(name), each) for name, each in actors.items()}, alone)
        engine = EngineGroup(crews.pop(ENGINE)) if ENGINE in crews else None
        roles = {
            role: RoleGroup(spec, crews[role], shipper, self.plan.config.output)
            for role, spec in self.plan.roles.items()
        }
        for role, group in roles.items():
            check_devices(role, group.call("devices"))
        call_chains({role: partial(_start, crew) for role, crew in crews.items()}, [[role] for role in crews])
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
        _, waiting = ray.wait([g.ready() for g in groups], num_returns=len(groups), timeout=self.limits.placing)
        if waiting:
            raise UsageError(
                f"the cluster did not place {len(waiting)} of {len(groups)} groups of workers in {self.limits.placing:g} s; "
                f"free resources, use {option('strategy', 'PACK')}, or let it take longer with {option('wait')}"
            )

    def _actor(self, body: type, seat: Seat, *args: Any) -> Any:
        """One actor in its seat."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        share = dict(self.layout.share(seat))
        # Ray hides the GPUs of a worker that asks for some, not of others
        hidden = {} if share.get("GPU") else {"CUDA_VISIBLE_DEVICES": ""}
        actor = ray.remote(concurrency_groups={GROUP: 1})(body).options(
            num_cpus=share.pop("CPU", 0),
            num_gpus=share.pop("GPU", 0),
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


def _title(name: str) -> str:
    """The name of a role's workers, or of the engines, in messages."""
    return "rollout engine" if name == ENGINE else f"role {name}"


class _RayPlaced(Placement):
    """What is placed, with the cluster to close."""

    def __init__(self, roles: dict[str, Any], rollout: Any, world: World, cluster: Cluster) -> None:
        super().__init__(roles, rollout, world)
        self.cluster = cluster

    def together(self, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Roles with bundles of their own work at once; those that share one work in turn."""
        return call_chains(calls, self.cluster.layout.chains(calls))

    def close(self) -> None:
        self.cluster.close()


def disconnect(started: bool) -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    if started:
        ray.shutdown()
