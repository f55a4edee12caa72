"""The check of algorithms: do the terms, roles and needs that it composes fit together?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.contract.hooks import CHOSEN
from rlhf_core.contract.options import ModelOptions, RunConfig, TrainedOptions
from rlhf_core.contract.plan import DATA, Plan
from rlhf_core.contract.terms import Term
from rlhf_core.testing.providers import check_provider
from rlhf_core.training.planner import make_plan

if TYPE_CHECKING:
    from rlhf_core.contract.providers import Algorithm
    from rlhf_core.plugins.registry import Registry

__all__ = ["check_algorithm"]


def check_algorithm(algorithm: Algorithm, registry: Registry | None = None, **chosen: Any) -> Plan:
    """Its defaults exist, its terms train roles that it gives options for, and everything they need is provided.

    Args:
        algorithm: the provider.
        registry: where the defaults are looked up; everything installed if absent.
        chosen: providers by kind instead of the defaults.

    Raises:
        AssertionError, UsageError: it is not so.
    """
    from rlhf_core.plugins.registry import default_registry

    check_provider(algorithm)
    registry = registry or default_registry()
    name = type(algorithm).__qualname__
    unknown = sorted(set(algorithm.defaults) - set(CHOSEN))
    assert not unknown, f"{name}.defaults has {unknown[0]!r}, which is not a kind; kinds are {', '.join(CHOSEN)}"
    for role, options in algorithm.roles.items():
        assert isinstance(options, ModelOptions), f"{name}.roles[{role!r}] must be ModelOptions or TrainedOptions"
    classes = {kind: registry.resolve(kind, use) for kind, use in algorithm.defaults.items() if kind not in chosen}
    providers = {kind: cls() for kind, cls in classes.items() if kind in ("advantage", "loss")}
    config = RunConfig(
        algorithm=algorithm,
        providers=providers | chosen,
        names=dict(algorithm.defaults),
        roles=dict(algorithm.roles),
        model="tiny",
    )
    plan = make_plan(config)
    assert plan.terms, f"{name} must return at least one term"
    for term in plan.terms:
        assert isinstance(term, Term), f"{name} must return Terms, not {type(term).__name__}"
        assert term.source == DATA or term.source in plan.roles, (
            f"{name}: source {term.source!r} is neither data nor a role"
        )
        assert isinstance(algorithm.roles[term.role], TrainedOptions), (
            f"{name}: role {term.role!r} is trained, so its options must be `TrainedOptions`"
        )
    return plan
