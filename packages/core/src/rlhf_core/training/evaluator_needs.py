"""Check that a run has the roles and outputs that its evaluators need; if not, name the option to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rlhf_core.contract.options import RunConfig
from rlhf_core.contract.requirements import Need, resolve
from rlhf_core.errors import UsageError, option, options_under

__all__ = ["evaluator_needs"]


def evaluator_needs(
    config: RunConfig, first: str, outputs: Mapping[str, Collection[str]], known: Collection[str]
) -> list[Need]:
    """Return the needs of all evaluators of a run.

    Args:
        config: of the run.
        first: the role that an evaluator measures.
        outputs: what terms and sources ask of each role.
        known: names of all outputs.

    Raises:
        UsageError: one asks for a role that the run's algorithm does not have.
    """
    found = []
    for path, evaluator in config.provider_paths("evaluator"):
        needs = [resolve(name, first, evaluator, known) for name in sorted(evaluator.needs)]
        absent = [need for need in needs if need.role and need.role not in config.roles]
        if absent:
            advice = "choose another evaluator"
            for field, value in _choices(evaluator):
                others = [
                    resolve(name, first, evaluator, known)
                    for name in dataclasses.replace(evaluator, **{field: value}).needs
                ]
                if all(need.output in outputs.get(need.role, ()) for need in others):
                    advice = f"pass {option(field, value)}"
                    break
            with options_under(path):
                raise UsageError(
                    f"the evaluator {type(evaluator).__qualname__} compares with the {absent[0].role}, but "
                    f"{type(config.algorithm).__qualname__} has none; {advice}"
                )
        found += needs
    return found


def _choices(evaluator: Any) -> Iterator[tuple[str, Any]]:
    """Return every field of an evaluator that is a choice of words, with each of them."""
    annotations = get_type_hints(type(evaluator))
    for each in dataclasses.fields(evaluator):
        if get_origin(annotations[each.name]) is Literal:
            yield from ((each.name, value) for value in get_args(annotations[each.name]))
