"""Roles whose weights follow a trained role's: opponents, target networks, moving references.

Their version is that of the role they track when they last took its weights, so that the two differ by the optimizer steps that
they are behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_core.contract.options import Tracking
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.roles import Role

__all__ = ["begin_tracking", "follow_roles", "steps_behind"]


def begin_tracking(plan: Plan, roles: Mapping[str, Role]) -> None:
    """Let tracking roles begin as copies, unless they have their own model to begin with."""
    for role, tracked, _ in _pairs(plan, roles):
        if role.spec.options.model == tracked.spec.options.model:
            role.load_weights(tracked.weights())


def follow_roles(plan: Plan, roles: Mapping[str, Role]) -> list[str]:
    """Let tracking roles take weights where it is time; return the names of those that did.

    It is time when the tracked role has taken `every` optimizer steps or more since the last time. Every rank calls it.
    """
    moved = []
    for role, tracked, track in _pairs(plan, roles):
        if tracked.version - role.version >= track.every:
            role.load_weights(tracked.weights(), track.decay)
            role.version = tracked.version
            moved.append(role.name)
    return moved


def steps_behind(plan: Plan, roles: Mapping[str, Role]) -> dict[str, int]:
    """Return how many optimizer steps each tracking role is behind."""
    return {role.name: tracked.version - role.version for role, tracked, _ in _pairs(plan, roles)}


def _pairs(plan: Plan, roles: Mapping[str, Role]) -> Iterator[tuple[Role, Role, Tracking]]:
    """Yield each tracking role with the role that it tracks."""
    for name in plan.tracking_roles:
        track = plan.roles[name].tracking
        if track is not None and track.of in roles:
            yield roles[name], roles[track.of], track
