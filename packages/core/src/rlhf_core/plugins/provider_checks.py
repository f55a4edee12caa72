"""Checks of a provider's class, before one is made of it: its base, its options, its capabilities and its signatures.

Core reads capabilities by name (`rlhf_core.contract.providers`). A misspelt one would keep its default in silence, and an
option that happens to have such a name would change what core does. Both are refused here with a one-line error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

from rlhf_core.contract import providers
from rlhf_core.contract.capability import OPTIONAL, Capability
from rlhf_core.contract.commands import Command
from rlhf_core.contract.hooks import KINDS
from rlhf_core.contract.ingredients import Ingredient
from rlhf_core.contract.optimizers import OptimizerProvider
from rlhf_core.contract.options import ModelOptions, RunConfig
from rlhf_core.contract.outputs import Output
from rlhf_core.contract.providers import Algorithm, Provider
from rlhf_core.contract.selection import Filter, Sampler
from rlhf_core.errors import UsageError
from rlhf_core.util.suggestions import did_you_mean

if TYPE_CHECKING:
    from rlhf_core.contract.registry_view import RegistryView

__all__ = ["capabilities", "check_class", "class_of"]

BASES: Mapping[str, type[Any]] = {
    **providers.BASES,
    "command": Command,
    "filter": Filter,
    "sampler": Sampler,
    "ingredient": Ingredient,
    "optimizer": OptimizerProvider,
    "output": Output,
}
"""The base class of every kind."""

UNOPENED = {
    "loss": "a loss is a pure function; keep state in the advantage",
    "algorithm": "an algorithm is only called once, for its terms; keep state in the advantage",
    "strategy": "calling a strategy already opens it and returns a Trainable",
    "launcher": "calling a launcher already opens it and returns a Placement",
    "observer": "calling an observer already opens it and returns an object with hooks",
}
"""Kinds that are not opened, each with the reason."""

FORMER = {"wants": "outputs"}
"""Capabilities that had another name."""


def check_class(kind: str, who: str, target: Any) -> type[Any]:
    """Return `target` if it is what a provider of `kind` has to be.

    Args:
        kind: the kind of provider.
        who: its name, for messages.
        target: what is registered under that name, or what `module:Class` names.

    Raises:
        UsageError: it is not; the message states what to write.
    """
    _check_dataclass(kind, who, target)
    cls: type[Any] = target
    base = BASES.get(kind)
    if base is None:
        return cls
    if not issubclass(target, base):
        raise UsageError(
            f"{kind} {who} does not subclass {base.__name__}; write class {target.__name__}({base.__name__}): "
            f"(from rlhf_core import {base.__name__})"
        )
    known = capabilities(base)
    _check_fields(kind, who, target, known)
    for name, value in _own_attributes(target, base):
        _check_place_of_state(kind, who, name)
        _check_name(kind, who, name, known)
        if name in known:
            _check_value(kind, who, name, value, known[name])
    _check_signature(kind, who, target, base)
    if issubclass(target, Algorithm):
        _check_algorithm(who, target)
    return cls


def class_of(kind: str, name: str, instance: object, registry: RegistryView) -> type[Any]:
    """Return the class of a provider that is given by name, or as an instance where there is one.

    Raises:
        UsageError: no such name, or a class that no provider of this kind can have.
    """
    if instance is None:
        return registry.resolve(kind, name)
    return check_class(kind, type(instance).__qualname__, type(instance))


def capabilities(base: type[Any]) -> dict[str, Any]:
    """Return everything that core reads of a provider with this base class, by name.

    The values are `Capability` objects, methods and class attributes.
    """
    options = {each.name for each in fields(base)} if is_dataclass(base) else set()
    found: dict[str, Any] = {}
    for cls in reversed(base.__mro__[:-1]):
        found |= {name: value for name, value in vars(cls).items() if not name.startswith("_") and name not in options}
    return found


def _check_dataclass(kind: str, who: str, target: Any) -> None:
    if not isinstance(target, type):
        raise UsageError(f"{kind} {who} is a {type(target).__name__}, not a class; give the class of the provider")
    if not (is_dataclass(target) and target.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise UsageError(f"{kind} {who} is not a frozen dataclass; write @dataclass(frozen=True) above the class")
    own = vars(target).get("__annotations__", {})
    options = [name for name, type_ in own.items() if not str(type_).startswith(("ClassVar", "typing.ClassVar"))]
    if options and "__dataclass_fields__" not in vars(target):
        raise UsageError(
            f"{kind} {who} declares the option {options[0]!r} but is not a dataclass; write @dataclass(frozen=True) "
            "above the class"
        )


def _check_fields(kind: str, who: str, target: type, known: Mapping[str, Any]) -> None:
    """Check that no option has the name of what core reads, unless users may set it."""
    for each in fields(target):
        if each.name == "use":
            raise UsageError(f"{kind} {who} has an option 'use', a name that selects providers in files; rename it")
        if each.name in known and each.name not in OPTIONAL.get(kind, ()):
            raise UsageError(
                f"{kind} {who} has an option {each.name!r}, but core reads {each.name!r} of a {kind} as something "
                "else; rename the option, or declare it as a ClassVar"
            )


def _own_attributes(target: type, base: type) -> Iterator[tuple[str, Any]]:
    """Public class attributes, properties and methods of `target` that are no options, but for those of the base class."""
    options = {each.name for each in fields(target)}
    for cls in target.__mro__:
        if cls not in base.__mro__:
            for name, value in vars(cls).items():
                if not name.startswith("_") and name not in options:
                    yield name, value


def _check_place_of_state(kind: str, who: str, name: str) -> None:
    """Check that a provider has no state itself, and opens nothing where core would not ask it to."""
    if name in ("state_dict", "load_state_dict"):
        where = "it returns" if kind == "observer" else "open(context) returns"
        raise UsageError(f"{kind} {who} is frozen and has {name}(); move it to the object that {where}")
    if name == "open" and kind in UNOPENED:
        raise UsageError(f"{kind} {who} has open(), which core does not call: {UNOPENED[kind]}")


def _check_name(kind: str, who: str, name: str, known: Mapping[str, Any]) -> None:
    """Check that `name` is no misspelt capability."""
    if name in known:
        return
    meant = (
        FORMER.get(name) if FORMER.get(name) in known else next((each for each in known if _alike(name, each)), None)
    )
    if meant is not None:
        raise UsageError(
            f"{kind} {who} has {name!r}, which core does not read (did you mean {meant!r}?); rename it, or start a "
            "private name with _"
        )


def _alike(name: str, known: str) -> bool:
    """Return True if two names differ by one letter, two neighbors in the other order, or underscores and case alone."""
    a, b = (word.replace("_", "").lower() for word in (name, known))
    if a == b:
        return True
    if min(len(a), len(b)) < 4:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[:2] == rest_b[1::-1] and rest_a[2:] == rest_b[2:]
    return swapped or rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:]


def _check_value(kind: str, who: str, name: str, value: Any, declared: Any) -> None:
    """Check that a capability is a value where core reads a value, and a method where core calls one."""
    if isinstance(declared, FunctionType):
        if not callable(value) and not isinstance(value, (staticmethod, classmethod, property)):
            raise UsageError(
                f"{kind} {who}: {name} is {value!r}, but core calls it; write def {name}{_words(declared)}:"
            )
        return
    if isinstance(value, FunctionType):
        raise UsageError(f"{kind} {who}: {name} is a method, but core reads a value; write @property above it")
    if not isinstance(declared, Capability) or hasattr(type(value), "__get__"):  # a property's value is not known yet
        return
    usual = declared.default(None)
    if isinstance(usual, Set) and not isinstance(value, Set):
        raise UsageError(
            f"{kind} {who}: {name} is a {type(value).__name__}, not a set of names; write {name} = frozenset({{…}})"
        )
    if isinstance(usual, (bool, int, str)) and not isinstance(value, type(usual)):
        raise UsageError(
            f"{kind} {who}: {name} is {value!r}; give a value of type {type(usual).__name__}, such as {usual!r}"
        )


def _check_signature(kind: str, who: str, target: type, base: type[Any]) -> None:
    """Check that what core calls takes what core passes."""
    methods = {name: value for name, value in capabilities(base).items() if isinstance(value, FunctionType)}
    opens = issubclass(target, Provider) and target.open is not Provider.open
    for name, declared in {"__call__": vars(base)["__call__"], **methods}.items():
        own = inspect.getattr_static(target, name)
        if own is declared:
            if name == "__call__" and not opens:  # else core calls what it opens
                raise UsageError(f"{kind} {who} cannot be called; write def __call__{_words(declared)}:")
            continue
        if not isinstance(own, FunctionType):
            continue
        passed = list(inspect.signature(declared).parameters)
        try:
            inspect.signature(own).bind(*passed)
        except TypeError:
            raise UsageError(
                f"{kind} {who}: {name}{_words(own)} is called with {_words(declared)}; write def {name}{_words(declared)}:"
            ) from None


def _words(function: FunctionType) -> str:
    """Return the parameters of a function, `(self, rollouts)`."""
    return f"({', '.join(str(each).partition(':')[0] for each in inspect.signature(function).parameters.values())})"


def _check_algorithm(who: str, target: type[Algorithm]) -> None:
    """Check what an algorithm declares of kinds, roles and core's own options."""
    for name, example in (("defaults", '{"data": "json"}'), ("roles", '{"actor": TrainedOptions()}')):
        if vars(Algorithm)[name] is inspect.getattr_static(target, name):
            raise UsageError(
                f"algorithm {who} declares no {name}; write {name}: ClassVar[Mapping[str, Any]] = {example}"
            )
    for kind in target.defaults:
        if kind not in KINDS:
            raise UsageError(
                f"algorithm {who}: defaults has {kind!r}, which is not a kind{did_you_mean(kind, KINDS)}; rename it"
            )
    for role, options in target.roles.items():
        if not isinstance(options, ModelOptions):
            raise UsageError(
                f"algorithm {who}: roles[{role!r}] is {options!r}; write ModelOptions(), or TrainedOptions() for a trained one"
            )
    known = [each.name for each in fields(RunConfig)]
    for name in target.config_defaults:
        if name not in known:
            raise UsageError(
                f"algorithm {who}: config_defaults has {name!r}, which is not an option of a "
                f"run{did_you_mean(name, known)}; rename it"
            )
