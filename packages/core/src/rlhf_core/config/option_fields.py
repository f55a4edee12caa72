"""The options of one dataclass: each field, nested ones flattened, with type, default and description."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, get_args, get_origin

from rlhf_core.config.docstrings import docs_of
from rlhf_core.config.value_types import given_by, metavar
from rlhf_core.errors import ContractError

__all__ = [
    "Option",
    "Use",
    "annotation_of",
    "default_of",
    "flag",
    "format_default",
    "nested_dataclass",
    "option_fields",
    "options_of",
]


@dataclass(frozen=True)
class Option:
    """One value that can be set."""

    path: str
    annotation: Any
    doc: str
    default: Any
    """default value; MISSING if the option is required"""

    @property
    def required(self) -> bool:
        """Return True if the option has no default."""
        return self.default is MISSING

    def describe(self, name: str) -> str:
        """Return `--reward.limit INT (characters at most)`: the flag as `name`, and the first clause of its help."""
        clause = re.split(r"[,;:.](?:\s|$)| \(", self.doc, maxsplit=1)[0]
        remarks = "; ".join(each for each in (clause, self.elsewhere) if each)
        spelled = self.path if self.elsewhere else f"{name} {metavar(self.annotation)}"
        return f"{spelled} ({remarks})" if remarks else spelled

    @property
    def note(self) -> str:
        """`required`, or the default in the words that would give it."""
        return "required" if self.required else f"default: {format_default(self.default)}"

    @property
    def elsewhere(self) -> str:
        """The places that can give the option, if a flag cannot; empty if one can."""
        return {"flag": "", "file": "from a file or Python only", "python": "from Python only"}[
            given_by(self.annotation)
        ]


@dataclass(frozen=True)
class Use:
    """A provider that is chosen inside a section: `[actor.optim] use = "muon"`."""

    name: str
    cls: type
    base: Any
    """the instance whose values are the defaults, or some of them by name"""
    names: tuple[str, ...]
    """names that can be chosen"""


def flag(path: str) -> str:
    """The flag of an option."""
    return "--" + path.replace("_", "-")


def format_default(value: Any) -> str:
    """A default as help shows it, in the words that would give it."""
    match value:
        case None:
            return "none"
        case "":
            return "empty"
        case tuple() | list() | set() | frozenset():
            return " ".join(map(format_default, value)) or "empty"
        case Mapping():
            return " ".join(f"{key}={format_default(each)}" for key, each in value.items()) or "empty"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return value.__qualname__  # and no address in memory
    return "given" if dataclasses.is_dataclass(value) else str(value)


def option_fields(cls: type, skip: tuple[str, ...] = ()) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a dataclass that are options."""
    for each in dataclasses.fields(cls):
        if each.init and each.name not in skip and not each.metadata.get("internal"):
            yield each


def annotation_of(cls: type, name: str) -> Any:
    """The type of a field, `Annotated` kept. Class variables are not evaluated: they may name what is not imported."""
    owner = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
    annotation = owner.__annotations__[name]
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(vars(sys.modules[owner.__module__])), dict(vars(owner)))  # noqa: S307  # the provider's source
    except NameError as error:
        raise ContractError(
            f"{owner.__module__}.{owner.__qualname__}.{name}: the type {annotation!r} of an option must be known at "
            f"run time, but {error}; import it outside TYPE_CHECKING"
        ) from None


def nested_dataclass(annotation: Any) -> tuple[type | None, bool]:
    """The dataclass that an option consists of, if it does, and whether it may be None."""
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    members = [each for each in get_args(bare) if each is not types.NoneType]
    optional = isinstance(bare, types.UnionType) or len(members) < len(get_args(bare))
    candidate = members[0] if optional and len(members) == 1 else bare
    return (candidate, optional) if dataclasses.is_dataclass(candidate) else (None, False)  # type: ignore[return-value]


def default_of(each: dataclasses.Field[Any], base: Any) -> Any:
    """Return a field's value in `base`, else its default; MISSING if it has neither."""
    if isinstance(base, Mapping) and each.name in base:
        return base[each.name]
    if base is not None and not isinstance(base, Mapping):
        return getattr(base, each.name)
    return each.default_factory() if each.default_factory is not MISSING else each.default


def options_of(
    cls: type,
    base: Any = None,
    prefix: str = "",
    skip: tuple[str, ...] = (),
    uses: Mapping[str, Use] | None = None,
) -> Iterator[Option]:
    """Every option under `prefix`, nested dataclasses flattened; of the providers in `uses`, those chosen there."""
    docs = docs_of(cls).fields
    for each in option_fields(cls, skip):
        path = f"{prefix}.{each.name}".lstrip(".")
        annotation, default = annotation_of(cls, each.name), default_of(each, base)
        if uses and path in uses:
            use = uses[path]
            doc = f"{docs.get(each.name, 'provider')}: {', '.join(use.names)}, or module:Class"
            yield Option(f"{path}.use", str, doc, use.name)
            yield from options_of(use.cls, use.base, path)
            continue
        inner, optional = nested_dataclass(annotation)
        if inner is None:
            yield Option(path, annotation, docs.get(each.name, ""), default)
            continue
        if optional:
            doc = f"{docs.get(each.name, '')}; `none` leaves it out".lstrip("; ")
            yield Option(path, types.NoneType, doc, default)
        yield from options_of(inner, None if default in (None, MISSING) else default, path)
