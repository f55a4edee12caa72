"""Values and messages between the process of the tests and that of the program, as lines of JSON.

Nothing that arrives is run, and no class is looked up by a name that arrives, but for those in the tables below: a forged
message carries no more than a value that the program might have returned.

| value | form |
|---|---|
| None, bool, str, small int, finite float | itself |
| other data | `[kind, ...]` |
| a container of this exchange that has been seen | `["same", number]` |
| anything else | what `export` makes of it: a handle |
"""

from __future__ import annotations

import builtins
import importlib
import json
import math
import os
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["DATA_ATTRIBUTES", "MESSAGE_BYTES", "BrokenWire", "Message", "Peer"]

MESSAGE_BYTES = 8 << 20
"""The longest message that is read."""

DATA_ATTRIBUTES = {
    name for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set) for name in dir(kind)
}
DATA_ATTRIBUTES |= {"allclose", "array_equal", "equal", "equals", "isclose"}
"""Attributes of data, of arrays too: a test that uses one of a result expects data."""

MAPPINGS: dict[str, Callable[[], Any]] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
SEQUENCES: dict[str, Callable[[], Any]] = {"list": list, "set": set, "deque": deque, "bytearray": bytearray}
FIXED: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "frozenset": frozenset, "bytes": bytes}
NAMES: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter", defaultdict: "defaultdict"}
NAMES |= {list: "list", set: "set", deque: "deque", bytearray: "bytearray"}
NAMES |= {tuple: "tuple", frozenset: "frozenset", bytes: "bytes"}
TEXTS: dict[tuple[str, str], tuple[str, str]] = {  # (module, class): (method that writes, class method that reads)
    ("decimal", "Decimal"): ("__str__", ""),
    ("fractions", "Fraction"): ("__str__", ""),
    ("datetime", "date"): ("isoformat", "fromisoformat"),
    ("datetime", "time"): ("isoformat", "fromisoformat"),
    ("datetime", "datetime"): ("isoformat", "fromisoformat"),
}


class BrokenWire(Exception):
    """The other side is gone, or wrote what is no message."""


class Message:
    """The values of one exchange, a request and its answer; both sides number the containers in it alike.

    Args:
        export: the form of a value that is not data.
        resolve: the value of a form that `export` of the other side made.
    """

    def __init__(self, export: Callable[[Any], Any], resolve: Callable[[list[Any]], Any]) -> None:
        self.export, self.resolve = export, resolve
        self.containers: list[Any] = []
        self._numbers: dict[int, int] = {}  # id -> number; the list above keeps them alive

    def encode(self, value: Any) -> Any:
        """Return the form of a value."""
        kind: Any = type(value)
        if value is None:
            return None
        if kind is bool or kind is str:
            return value
        if kind is int:
            return value if abs(value) < 1 << 53 else ["int", hex(value)]
        if kind is float:
            return value if math.isfinite(value) else ["float", repr(value)]
        if kind is complex:
            return ["complex", repr(value.real), repr(value.imag)]
        if kind is range:
            return ["range", *map(self.encode, (value.start, value.stop, value.step))]
        if value is Ellipsis:
            return ["ellipsis"]
        if id(value) in self._numbers:
            return ["same", self._numbers[id(value)]]
        if kind in NAMES:
            return self._encode_collection(value, NAMES[kind])
        if kind is type and vars(builtins).get(name := str(value.__name__)) is value:
            return ["type", name]
        if (text := TEXTS.get((kind.__module__, kind.__qualname__))) is not None:
            return ["text", kind.__module__, kind.__qualname__, getattr(value, text[0])()]
        if isinstance(value, tuple) and isinstance(fields := vars(kind).get("_fields"), tuple):
            return ["named", kind.__name__, list(fields), [self.encode(item) for item in value]]
        if kind.__module__ == "numpy" and any(each.__name__ == "generic" for each in kind.__mro__):
            return self.encode(value.item())
        return self.export(value)

    def decode(self, form: Any) -> Any:
        """Return the value of a form.

        Raises:
            Exception: the form is none that `encode` makes.
        """
        if not isinstance(form, list):
            return form
        kind, *rest = form
        if kind in ("list", "set", "deque", "bytearray", "dict", "OrderedDict", "Counter", "defaultdict"):
            return self._decode_container(kind, rest)
        if kind in FIXED:
            return FIXED[kind]([self.decode(item) for item in rest[0]])
        match kind:
            case "same":
                return self.containers[_index(rest[0])]
            case "int":
                return int(rest[0], 16)
            case "float":
                return float(rest[0])
            case "complex":
                return complex(float(rest[0]), float(rest[1]))
            case "range":
                return range(*map(self.decode, rest))
            case "ellipsis":
                return ...
            case "type":
                return _builtin_type(rest[0])
            case "text":
                return _from_text(*rest)
            case "named":
                return self._decode_named(*rest)
        return self.resolve(form)

    def contents(self) -> list[Any]:
        """Return the forms of what each container holds now."""
        return [self._items(container) for container in list(self.containers)]

    def assign(self, number: Any, items: Any) -> None:
        """Let a container hold the content of a form of `contents`."""
        container = self.containers[_index(number)]
        if isinstance(container, dict):
            pairs = [(self.decode(key), self.decode(value)) for key, value in items]
            container.clear()
            dict.update(container, pairs)
        elif isinstance(container, set):
            values = {self.decode(item) for item in items}
            container.clear()
            container.update(values)
        elif isinstance(container, bytearray):
            container[:] = bytes(items)
        else:
            values_in_order = [self.decode(item) for item in items]
            container.clear()
            container.extend(values_in_order)

    def _encode_collection(self, value: Any, name: str) -> list[Any]:
        if name in FIXED:
            return [name, list(value) if name == "bytes" else [self.encode(item) for item in value]]
        self._register(value)
        extra = {"defaultdict": lambda: [self.encode(value.default_factory)], "deque": lambda: [value.maxlen]}
        return [name, self._items(value), *extra.get(name, list)()]

    def _decode_container(self, kind: str, rest: list[Any]) -> Any:
        """Return a new container, numbered before what is in it, as `encode` did."""
        if kind == "deque":
            value: Any = deque(maxlen=rest[1])
        elif kind == "defaultdict":
            value = defaultdict()
        else:
            value = (MAPPINGS.get(kind) or SEQUENCES[kind])()
        number = self._register(value)
        self.assign(number, rest[0])
        if kind == "defaultdict":
            value.default_factory = self.decode(rest[1])
        return value

    def _decode_named(self, name: str, fields: list[str], forms: list[Any]) -> tuple[Any, ...]:
        values = [self.decode(form) for form in forms]
        if any(field in DATA_ATTRIBUTES and callable(value) for field, value in zip(fields, values)):
            raise ValueError("a field that poses as a method of data")
        return namedtuple(name, fields, rename=True)(*values)

    def _items(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [[self.encode(key), self.encode(item)] for key, item in list(dict.items(value))]
        if isinstance(value, bytearray):
            return list(value)
        return [self.encode(item) for item in list(value)]

    def _register(self, value: Any) -> int:
        self._numbers[id(value)] = len(self.containers)
        self.containers.append(value)
        return len(self.containers) - 1


def _index(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"no number of a container: {number!r}")
    return number


def _builtin_type(name: Any) -> type:
    value = vars(builtins).get(name)
    if type(value) is not type:
        raise ValueError(f"no type: {name!r}")
    return value


def _from_text(module: Any, name: Any, text: Any) -> Any:
    _, reader = TEXTS[module, name]
    kind = getattr(importlib.import_module(module), name)
    return (getattr(kind, reader) if reader else kind)(str(text))


class Peer:
    """One end of the wire."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.outgoing = outgoing
        self._lines = self._read_lines(incoming)

    def send(self, message: Any) -> None:
        """Write a message.

        Raises:
            BrokenWire: the other side is gone.
        """
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self.outgoing, data) :]
        except OSError as error:
            raise BrokenWire from error

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            BrokenWire: the other side is gone, or wrote something else.
        """
        line = next(self._lines, None)
        if line is None:
            raise BrokenWire("the other side is gone")
        try:
            return json.loads(line)
        except (ValueError, RecursionError, MemoryError) as error:
            raise BrokenWire("no message") from error

    @staticmethod
    def _read_lines(incoming: int) -> Iterator[bytes]:
        buffer = bytearray()
        while len(buffer) <= MESSAGE_BYTES and (data := os.read(incoming, 1 << 16)):
            start = len(buffer)
            buffer += data
            while (end := buffer.find(b"\n", start)) >= 0:
                yield bytes(buffer[:end])
                del buffer[: end + 1]
                start = 0
