"""The process of a generated program: it answers calls (`serve`), or reads an input and writes an output (`run_script`).

The program may change anything here: it shares this process. The other side treats its output as data only.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import io
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rlhf_core.reward.sandbox.wire import BrokenWire, Message, Peer

__all__ = ["run_script", "serve"]

OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift eq lt le gt ge "
        "neg pos abs invert getitem setitem delitem contains"
    ).split()
}
OPERATORS |= {
    "call": lambda function, *args, **options: function(*args, **options),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "str": str,
    "repr": repr,
    "format": format,
    "int": int,
    "float": float,
    "round": round,
    "hash": hash,
    "divmod": divmod,
    "isinstance": isinstance,
    "issubclass": issubclass,
    "enter": lambda manager: manager.__enter__(),
    "exit": lambda manager, kind, text: manager.__exit__(kind, kind and kind(text), None),
    "await": lambda coroutine: importlib.import_module("asyncio").run(coroutine),
}
"""Operations that tests may apply to an object of the program."""


def run_script(source: str) -> None:
    """Run the program as a script, on the standard streams; its exit code is that of this process."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8")  # type: ignore[misc]  # noqa: SIM115  # open until the end
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8")  # type: ignore[misc]  # noqa: SIM115
    exec(compile(source, "<program>", "exec"), _make_module("__main__"))  # noqa: S102  # it is what this process is for


def serve(source: str, incoming: int, outgoing: int) -> NoReturn:
    """Load the program as a module, then answer the requests of the tests until they end."""
    peer = Peer(incoming, outgoing)
    names = _make_module("program")
    sys.stdout = printed = io.StringIO()
    try:
        exec(compile(source, "<program>", "exec"), names)  # noqa: S102  # it is what this process is for
    except BaseException:  # it may raise SystemExit or KeyboardInterrupt too
        os._exit(1)
    server = _Server(peer, names, printed)
    with contextlib.suppress(BrokenWire):
        peer.send("ready")
        while True:
            server.answer(peer.receive())
    os._exit(0)


def _make_module(name: str) -> dict[str, Any]:
    """Make an empty module, as `import` would, and return its names."""
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)


class _Server:
    """The program's objects by number, and the answers to requests about them."""

    def __init__(self, peer: Peer, names: dict[str, Any], printed: io.StringIO) -> None:
        self.peer, self.names, self.printed = peer, names, printed
        self.objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def answer(self, request: Any) -> None:
        """Answer a request, `[operation, [argument], {name: argument}]`, whatever happens."""
        operation, forms, options = request
        message = Message(self._export, self._resolve)
        arguments = [message.decode(form) for form in forms]
        keywords = {name: message.decode(form) for name, form in options.items()}
        before = message.contents()
        try:
            status, value = "ok", self._perform(operation, arguments, keywords)
        except BaseException as error:  # whatever the program raises is raised in the tests
            ends = operation == "next" and isinstance(error, StopIteration)
            status, value = "stop" if ends else "raise", error
        try:
            after = message.contents()
            changed = [[number, after[number]] for number, items in enumerate(before) if after[number] != items]
            form = message.encode(value) if status == "ok" else self._describe(message, value)
        except Exception as error:
            status, changed = "raise", []
            form = self._describe(message, TypeError(f"the answer cannot be sent: {error!r}"[:200]))
        self.peer.send([status, form, changed, self.printed.getvalue()])
        self.printed.seek(0)
        self.printed.truncate()

    def _perform(self, operation: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        if operation == "name":
            return self.names[arguments[0]]
        return OPERATORS[operation](*arguments, **keywords)

    def _export(self, value: Any) -> list[Any]:
        """Return the handle of an object, with its kind."""
        number = self._number(value)
        if isinstance(value, type):
            if issubclass(value, BaseException):
                return ["exception", *self._classes(value)]
            return ["object", number, "class"]
        if isinstance(value, types.CoroutineType):
            return ["object", number, "coroutine"]
        return ["object", number, "iterator" if isinstance(value, Iterator) else "object"]

    def _resolve(self, form: list[Any]) -> Any:
        kind, *rest = form
        if kind == "object":
            return self.objects[rest[0]]
        if kind == "callback":
            return lambda *args, **options: self._call_back(rest[0], args, options)
        if kind == "iterator":
            return self._iterate(rest[0])
        module, name = rest  # "global"
        return operator.attrgetter(name)(importlib.import_module(module))

    def _number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._numbers[id(value)]

    def _classes(self, kind: type) -> list[Any]:
        """Return the program's own classes that an exception class derives from, and the built-in ones."""
        own = [each for each in kind.__mro__ if each.__module__ != "builtins"]
        return [
            [[self._number(each), each.__name__] for each in own],
            [each.__name__ for each in kind.__mro__ if each.__module__ == "builtins"],
        ]

    def _describe(self, message: Message, error: BaseException) -> list[Any]:
        """Return the form of an exception: its classes, arguments, text and handle."""
        try:
            arguments = [message.encode(each) for each in error.args]
        except Exception:
            arguments = []
        return [*self._classes(type(error)), arguments, str(error)[:1000], self._number(error)]

    def _call_back(self, number: int, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a function of the tests, and answer what it asks meanwhile."""
        message = Message(self._export, self._resolve)
        forms = [message.encode(each) for each in args]
        self.peer.send(["callback", number, forms, {name: message.encode(value) for name, value in options.items()}])
        while True:
            kind, *rest = self.peer.receive()
            if kind == "returned":
                return message.decode(rest[0])
            if kind == "raised":
                raise _make_error(*rest)
            self.answer([kind, *rest])

    def _iterate(self, number: int) -> Iterator[Any]:
        while True:
            more, value = self._call_back(number, (), {})
            if not more:
                return
            yield value


def _make_error(name: str, text: str) -> BaseException:
    """Make the exception that a function of the tests raised: built-in ones keep their class."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(Exception):
            return kind(text)
    return RuntimeError(f"{name}: {text}")
