"""Proxies of a program's functions, classes and objects for tests. Each use is a request to the program's process.

The expectation of a test must not depend on the program's answers about it:

* an object of the program never equals data, and data is compared here;
* operators between an object and data (`+`, `<`, `in`) are refused, or the program would be handed what the test expects;
  only a class that the tests use as one (`names.class_names`) defines their meaning for its objects;
* exceptions are built-in ones or classes of the program; it can raise none that ends a loop or the tests.
"""

from __future__ import annotations

import builtins
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rlhf_core.reward.sandbox.wire import DATA_ATTRIBUTES, BrokenWire, Message, Peer

__all__ = ["ProgramObject", "Session"]

CONTROL = (StopIteration, StopAsyncIteration, GeneratorExit, KeyboardInterrupt, SystemExit)
"""Exceptions that mean something to loops and interpreters; one that a call raises is a `ProgramError` to the tests."""

ATTRIBUTES = {"__name__", "__doc__", "__dict__", "__qualname__", "__annotations__", "__wrapped__", "__cause__"}
"""Special attributes that are the program's; libraries ask for others to learn how to treat an object."""


class ProgramError(RuntimeError):
    """The program raised something that tests cannot be handed."""


class Session:
    """The tests' end of the wire.

    Args:
        peer: the wire.
        on_loss: ends this process; nothing that a test does may outlive its program.
    """

    def __init__(self, peer: Peer, on_loss: Callable[[], NoReturn]) -> None:
        self.peer, self.on_loss = peer, on_loss
        self.exports: list[Callable[..., Any]] = []
        self.failed = False
        """True if an assertion failed in a function of the test that the program called, and might have caught"""
        self._classes: dict[int, type[BaseException]] = {}
        self._turn = threading.RLock()  # of the threads that a test starts

    def request(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """Return what the program answers, and change the arguments that it changed.

        Raises:
            BaseException: what the program raised.
        """
        message = Message(self._export, self._resolve)
        forms = [message.encode(argument) for argument in arguments]
        keywords = {name: message.encode(value) for name, value in options.items()}
        with self._turn:
            try:
                self.peer.send([operation, forms, keywords])
                while (reply := self.peer.receive())[0] == "callback":
                    self._call_back(*reply[1:])
                status, form, changed, printed = reply
                sys.stdout.write(printed)  # a test may have redirected it
                for number, items in changed:
                    message.assign(number, items)
                value = message.decode(form) if status == "ok" else self._make_error(message, *form)
            except Exception:  # whatever is wrong with it, it is no answer
                self.on_loss()
        if status == "ok":
            return value
        raise StopIteration if status == "stop" and operation == "next" else value

    def _export(self, value: Any) -> list[Any]:
        """Return the form of what is no data: a handle, the name of a library's function, or a function to call back."""
        if isinstance(value, ProgramObject):
            return ["object", value._number]
        if isinstance(value, type) and "_number" in vars(value):  # an exception class of the program
            return ["object", vars(value)["_number"]]
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType):
            return ["global", value.__self__.__name__, value.__qualname__]
        if isinstance(value, (type, types.MethodDescriptorType)):
            owner = value if isinstance(value, type) else value.__objclass__
            if owner.__module__ in sys.stdlib_module_names:
                return ["global", owner.__module__, value.__qualname__]
        elif isinstance(value, Iterator):
            return ["iterator", self._offer(lambda: next(([True, item] for item in value), [False, None]))]
        elif callable(value):
            return ["callback", self._offer(value)]
        raise TypeError(f"a program cannot be handed a {type(value).__name__}")

    def _offer(self, function: Callable[..., Any]) -> int:
        self.exports.append(function)
        return len(self.exports) - 1

    def _resolve(self, form: list[Any]) -> Any:
        kind, *rest = form
        if kind == "exception":
            return self._exception_class(*rest)
        number, what = rest
        if kind != "object" or type(number) is not int:
            raise BrokenWire("no value")
        if what == "coroutine":
            return self._await_result(number)
        return {"class": ProgramClass, "iterator": ProgramIterator}.get(what, ProgramObject)(self, number)

    async def _await_result(self, number: int) -> Any:
        return self.request("await", ProgramObject(self, number))

    def _call_back(self, number: int, forms: list[Any], options: dict[str, Any]) -> None:
        """Answer the program's call of a function of the tests that it was handed."""
        message = Message(self._export, self._resolve)
        function = self.exports[number]
        arguments = [message.decode(form) for form in forms]
        keywords = {str(name): message.decode(form) for name, form in options.items()}
        try:
            answer = ["returned", message.encode(function(*arguments, **keywords))]
        except Exception as error:
            self.failed |= isinstance(error, AssertionError)
            answer = ["raised", type(error).__name__, str(error)]
        self.peer.send(answer)

    def _make_error(
        self, message: Message, own: Any, known: Any, arguments: Any, text: str, number: int
    ) -> BaseException:
        """Return the exception that the program raised."""
        kind = self._exception_class(own, known)
        try:
            error = kind(*map(message.decode, arguments))
        except Exception:  # a class with its own constructor
            error = kind.__new__(kind, text)
        if own:
            error._object = ProgramObject(self, number)  # type: ignore[attr-defined]
        return error

    def _exception_class(self, own: list[Any], known: list[Any]) -> type[BaseException]:
        """Return a class of the program's exceptions, or the built-in one.

        Args:
            own: (number, name) of the program's classes in its order of resolution.
            known: the names of the built-in ones.
        """
        kind: type[BaseException] = vars(builtins)[known[0]]
        if not issubclass(kind, Exception) or issubclass(kind, CONTROL):
            kind = ProgramError
        for number, name in reversed(own):
            if number not in self._classes:
                members = {"_number": int(number), "__getattr__": _attribute_of_error, "__init__": _accept_arguments}
                self._classes[number] = type(str(name), (kind,), members)
            kind = self._classes[number]
        return kind


def _attribute_of_error(error: Any, name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(error._object, name)


def _accept_arguments(error: BaseException, *arguments: Any, **_: Any) -> None:
    error.args = arguments


class ProgramObject:
    """An object in the program's process."""

    __slots__ = ("_number", "_own", "_session")

    def __init__(self, session: Session, number: int, own: bool = False) -> None:
        object.__setattr__(self, "_session", session)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_own", own)  # made by a class that the tests use as one

    def _ask(self, operation: str, *arguments: Any, **options: Any) -> Any:
        return self._session.request(operation, self, *arguments, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._ask("call", *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        data = name in DATA_ATTRIBUTES and not self._own  # `f(x).startswith("a")`: a test that expects data
        if data or (name.startswith("__") and name not in ATTRIBUTES):
            raise AttributeError(f"an object of the program has no {name!r} here")
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._ask("delattr", name)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", key)

    def __iter__(self) -> Iterator[Any]:
        return ProgramIterator(self._session, self._ask("iter")._number)

    def __contains__(self, item: Any) -> bool:
        return self._ask("contains", item) is True if self._own else any(item == each for each in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProgramObject) and (other._number == self._number or self._ask("eq", other) is True)

    def __hash__(self) -> int:
        return self._ask("hash")  # type: ignore[no-any-return]  # Python checks it

    def __len__(self) -> int:
        return self._ask("len")  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        return self._ask("bool")  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return self._ask("str")  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return self._ask("repr")  # type: ignore[no-any-return]

    def __format__(self, form: str) -> str:
        return self._ask("format", form)  # type: ignore[no-any-return]

    def __enter__(self) -> Any:
        return self._ask("enter")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        """Leave a context of the program's. It may swallow an exception of the test, but no failed assertion."""
        known = kind if kind is not None and vars(builtins).get(kind.__name__) is kind else None
        return self._ask("exit", known, str(error)) is True and not isinstance(error, AssertionError)

    def __round__(self, digits: Any = None) -> Any:
        return self._ask("round", digits)

    def _operate(self, operation: str, left: Any, right: Any) -> Any:
        """Return the result of an operator, `NotImplemented` where the other side is data that the test may expect."""
        sides = [side for side in (left, right) if isinstance(side, ProgramObject)]
        own = any(side._own for side in sides)
        if len(sides) < 2 and not own:
            return NotImplemented
        result = self._session.request(operation, left, right)
        return _mark_own(result, own)


def _mark_own(value: Any, own: bool) -> Any:
    """Return `value`, and remember of an object that a class of the tests made it."""
    if isinstance(value, ProgramObject):
        object.__setattr__(value, "_own", own)
    return value


def _define_operators() -> None:
    """Give `ProgramObject` the operators of Python."""

    def unary(operation: str) -> Callable[[ProgramObject], Any]:
        return lambda self: self._ask(operation)

    def binary(operation: str) -> Callable[[ProgramObject, Any], Any]:
        return lambda self, other: self._operate(operation, self, other)

    def reflected(operation: str) -> Callable[[ProgramObject, Any], Any]:
        return lambda self, other: self._operate(operation, other, self)

    for name in ("neg", "pos", "abs", "invert", "int", "float"):
        setattr(ProgramObject, f"__{name}__", unary(name))
    for name in ("lt", "le", "gt", "ge"):
        setattr(ProgramObject, f"__{name}__", binary(name))
    for name in "add sub mul truediv floordiv mod pow matmul and xor or lshift rshift divmod".split():
        operation = f"{name}_" if name in ("and", "or") else name
        setattr(ProgramObject, f"__{name}__", binary(operation))
        setattr(ProgramObject, f"__r{name}__", reflected(operation))


_define_operators()


class ProgramIterator(ProgramObject):
    """An iterator or a generator of the program."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._ask("next")


class ProgramClass(ProgramObject):
    """A class of the program."""

    __slots__ = ()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _mark_own(self._ask("call", *arguments, **options), self._own)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, ProgramObject) and self._session.request("isinstance", instance, self) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return isinstance(kind, ProgramClass) and self._session.request("issubclass", kind, self) is True
