"""The roles of a run: those of its algorithm, and those that its advantage, loss and reward bring."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import CHOSEN
from rlhf_core.contract.options import ModelOptions, RunConfig
from rlhf_core.errors import ContractError
from rlhf_core.plugins.provider_checks import class_of

if TYPE_CHECKING:
    from rlhf_core.contract.providers import Algorithm
    from rlhf_core.plugins.registry import Registry

__all__ = ["BRINGS_ROLES", "roles_of"]

BRINGS_ROLES = ("advantage", "loss", "reward")
"""Kinds of provider that can bring their own roles."""


def roles_of(
    cls: type[Algorithm], names: Mapping[str, str], registry: Registry, instances: Mapping[str, Any]
) -> dict[str, ModelOptions]:
    """Return the default options of all roles: the algorithm's, and those that its advantage, loss and reward bring.

    Raises:
        ContractError: two of them differ about a role, or its name is taken.
    """
    owners = {"algorithm": cls}
    for kind in BRINGS_ROLES:
        if names.get(kind):
            owners[kind] = class_of(kind, names[kind], instances.get(kind), registry)
    taken = {each.name for each in dataclasses.fields(RunConfig)}
    roles: dict[str, ModelOptions] = {}
    owner_of: dict[str, str] = {}
    for kind, owner in owners.items():
        for role, options in owner.roles.items():
            who = f"{kind} {names[kind]!r}"
            if role in names or role in taken or (kind != "algorithm" and role in CHOSEN):
                raise ContractError(f"{who} has a role {role!r}, but that name is reserved; rename the role")
            if roles.setdefault(role, options) != options:
                raise ContractError(f"{who} and {owner_of[role]} both define a role {role!r}; rename one of them")
            owner_of.setdefault(role, who)
    return roles
