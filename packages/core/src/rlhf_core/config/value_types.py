"""Values of options: between words of the command line, TOML, and Python, by the option's type.

Each type is read in two ways, from words (everything is text) and from plain TOML values (already typed), and written
in one. Understood are str, int, float, bool, Path, Literal, Enum, `X | None`, unions, tuple, list, set, dict and Any.
`none` in a flag or a file stands for None, which TOML lacks.

Deliberately not a general library: options that need more structure than this are better given from Python.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rlhf_core.errors import UsageError
from rlhf_core.util.secrets import MASK, hide

__all__ = [
    "MASK",
    "Secret",
    "from_plain",
    "from_words",
    "given_by",
    "is_secret",
    "may_be_python",
    "metavar",
    "reveal",
    "to_plain",
]

NONE = "none"


@dataclass(frozen=True)
class Secret:
    """Marks an option that is never written or echoed: `token: Annotated[str, Secret()] = ""`.

    Users should give `env:NAME`, which is written as it is; the provider reads the value with `reveal(self.token)`.
    """


def reveal(secret: str) -> str:
    """The value of a secret option: the environment variable for `env:NAME`, else the text itself.

    Raises:
        UsageError: the variable is not set.
    """
    name = secret.removeprefix("env:")
    if name == secret:
        return hide(secret)
    if name not in os.environ:
        raise UsageError(f"an option is given as env:{name}, but the environment variable {name} is not set; set it")
    return hide(os.environ[name])


def is_secret(annotation: Any) -> bool:
    """Return True if `annotation` is marked as a secret."""
    return get_origin(annotation) is Annotated and any(isinstance(mark, Secret) for mark in annotation.__metadata__)


# ----------------------------------------------------------------------------------------------------------------------
# the shape of a type
# ----------------------------------------------------------------------------------------------------------------------

_MANY: dict[Any, Callable[[list[Any]], Any]] = {
    tuple: tuple,
    list: list,
    set: set,
    frozenset: frozenset,
    Sequence: tuple,
}
"""Types of several values, and how they are made from a list."""


def _strip_annotated(annotation: Any) -> Any:
    """The type without `Annotated`."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _origin(annotation: Any) -> Any:
    """The generic type (`tuple` for `tuple[int, ...]`), or the type itself."""
    return get_origin(_strip_annotated(annotation)) or _strip_annotated(annotation)


def _members(annotation: Any) -> list[Any] | None:
    """The alternatives of a union in the order they are tried: None first, str last; None where it is no union."""
    bare = _strip_annotated(annotation)
    if get_origin(bare) not in (Union, types.UnionType):
        return None
    return sorted(get_args(bare), key=lambda member: (member is not types.NoneType, _strip_annotated(member) is str))


def _element_types(annotation: Any, count: int) -> list[Any]:
    """The types of `count` elements. Raises ValueError if a tuple of fixed length has another one."""
    arguments = get_args(_strip_annotated(annotation)) or (Any,)
    if _origin(annotation) is not tuple or arguments[-1] is Ellipsis:
        return [arguments[0]] * count
    if len(arguments) != count:
        raise ValueError
    return list(arguments)


def metavar(annotation: Any) -> str:
    """Return the placeholder of a value in help and errors: `INT`, `{k1,k2}`, `FLOAT FLOAT`, `[STR ...]`."""
    bare, origin, arguments = _strip_annotated(annotation), _origin(annotation), get_args(_strip_annotated(annotation))
    if (members := _members(annotation)) is not None:
        named = [metavar(each) for each in members if each is not types.NoneType and given_by(each) != "python"]
        return "|".join(named + [NONE] * (types.NoneType in members))
    if origin is Literal:
        return "{" + ",".join(str(each) for each in arguments if each != "") + "}"
    if origin in _MANY:
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return " ".join(map(metavar, arguments))
        return f"[{metavar(arguments[0]) if arguments else 'VALUE'} ...]"
    if origin in (dict, Mapping):
        return f"[NAME={metavar(arguments[1]) if arguments else 'VALUE'} ...]"
    if isinstance(bare, type) and issubclass(bare, Enum):
        return "{" + ",".join(member.name for member in bare) + "}"
    names = {str: "STR", int: "INT", float: "FLOAT", bool: "True|False", types.NoneType: NONE, Any: "VALUE"}
    return names.get(bare) or getattr(bare, "__name__", str(bare)).upper()


def given_by(annotation: Any) -> str:
    """Return what can give an option of this type: `flag`, `file` (or Python), or `python` alone."""
    if _is_readable(annotation, nested=False):
        return "flag"
    return "file" if _is_readable(annotation, nested=True) else "python"


def may_be_python(annotation: Any) -> bool:
    """Return True if a value, or a part of one, may be of a type that only Python gives."""
    inner = [each for each in get_args(_strip_annotated(annotation)) if each is not Ellipsis]
    if _members(annotation) is not None or _origin(annotation) in (*_MANY, dict, Mapping):
        return any(map(may_be_python, inner))
    return given_by(annotation) == "python"


def _is_readable(annotation: Any, nested: bool, inside: bool = False) -> bool:
    """Return True if plain values can give this type; a flag has no values `nested` in values."""
    if (members := _members(annotation)) is not None:
        return any(_is_readable(each, nested, inside) for each in members if each is not types.NoneType)
    bare, origin, arguments = _strip_annotated(annotation), _origin(annotation), get_args(_strip_annotated(annotation))
    if origin in (*_MANY, dict, Mapping):
        elements = [
            each for each in (arguments[1:] if origin in (dict, Mapping) else arguments) if each is not Ellipsis
        ]
        return (nested or not inside) and all(_is_readable(each, nested, inside=True) for each in elements)
    is_enum = isinstance(bare, type) and issubclass(bare, Enum)
    return origin is Literal or is_enum or bare in (str, int, float, bool, Path, types.NoneType, Any)


# ----------------------------------------------------------------------------------------------------------------------
# from words
# ----------------------------------------------------------------------------------------------------------------------


def from_words(annotation: Any, words: Sequence[str]) -> Any:
    """The value that `words` give. Raises ValueError if they do not fit; `metavar` describes what fits."""
    if (members := _members(annotation)) is not None:
        return _first_that_reads(members, lambda member: from_words(member, words))
    origin = _origin(annotation)
    if origin in _MANY:
        elements = _element_types(annotation, len(words))
        return _MANY[origin]([from_words(element, [word]) for element, word in zip(elements, words, strict=True)])
    if origin in (dict, Mapping):
        keys = [word.partition("=") for word in words]
        if not all(equals for _, equals, _ in keys):
            raise ValueError
        element = (get_args(_strip_annotated(annotation)) or (str, str))[1]
        return {key: from_words(element, [value]) for key, _, value in keys}
    if origin is bool and not words:
        return True  # a bare `--resume`
    (word,) = words
    return _from_word(_strip_annotated(annotation), word)


def _from_word(bare: Any, word: str) -> Any:
    if bare is bool:
        return _require(word.lower() in ("true", "false"), word.lower() == "true")
    if bare in (str, int, float, Path):
        return bare(_require_storable(int(word) if bare is int else word))
    if get_origin(bare) is Literal:
        choices = {str(choice): choice for choice in get_args(bare)}
        return _require(word in choices, choices.get(word))
    if bare is Any:
        return _first_that_reads([int, float, bool, str], lambda member: _from_word(member, word))
    return from_plain(bare, word)


# ----------------------------------------------------------------------------------------------------------------------
# from and to plain values
# ----------------------------------------------------------------------------------------------------------------------


def from_plain(annotation: Any, value: Any) -> Any:
    """The value that a TOML value gives. Raises ValueError if it does not fit; values of the type itself do fit."""
    if (members := _members(annotation)) is not None:
        return _first_that_reads(members, lambda member: from_plain(member, value))
    bare, origin = _strip_annotated(annotation), _origin(annotation)
    if bare is Any:
        return value
    if bare is types.NoneType:
        return _require(value is None or (isinstance(value, str) and value.lower() == NONE), None)
    if origin is Literal:
        return _require(any(value == choice and type(value) is type(choice) for choice in get_args(bare)), value)
    if origin in _MANY:
        _require(not isinstance(value, (str, Mapping)) and isinstance(value, (Sequence, set, frozenset)), value)
        elements = _element_types(annotation, len(value))
        return _MANY[origin]([from_plain(element, each) for element, each in zip(elements, value, strict=True)])
    if origin in (dict, Mapping):
        element = (get_args(bare) or (str, Any))[1]
        return {key: from_plain(element, each) for key, each in _require(isinstance(value, Mapping), value).items()}
    if bare is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(bare, type) and issubclass(bare, Enum) and isinstance(value, str):
        return _require(value in bare.__members__, bare.__members__.get(value))
    if bare is Path and isinstance(value, str):
        return Path(_require_storable(value))
    return _require(
        isinstance(value, origin) and (bare is bool or not isinstance(value, bool)), _require_storable(value)
    )


def to_plain(value: Any) -> Any:
    """`value` as TOML has it. Raises ValueError for what TOML cannot hold."""
    match value:
        case None:
            return NONE
        case Enum():
            return value.name
        case bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case Mapping():
            return {str(key): to_plain(each) for key, each in value.items()}
        case set() | frozenset():
            return [to_plain(each) for each in sorted(value)]
        case Sequence():
            return [to_plain(each) for each in value]
    raise ValueError


def _require_storable(value: Any) -> Any:
    """Return `value` if a file of TOML can hold it. Raises ValueError for more than 64 bits, and text that is no UTF-8."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError
    if isinstance(value, str):
        value.encode()  # half a character raises
    return value


def _require(fits: bool, value: Any) -> Any:
    if not fits:
        raise ValueError
    return value


def _first_that_reads(members: Sequence[Any], read: Callable[[Any], Any]) -> Any:
    """The value of the first member that accepts it."""
    for member in members:
        try:
            return read(member)
        except ValueError:
            continue
    raise ValueError
