"""The process of the tests: runs them in order, and writes a line for each, 1 where it passed and 0 where it did not.

It never holds code of the program, and the program never sees the text of a test.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import os
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from rlhf_core.reward.sandbox.names import ALIASES, PRELUDE, class_names, free_names, trusted_names
from rlhf_core.reward.sandbox.remote import ProgramClass, ProgramObject, Session
from rlhf_core.reward.sandbox.wire import BrokenWire, Peer

__all__ = ["examine"]


def examine(tests: Sequence[str], under_test: Sequence[str], peer: Peer, results: int) -> NoReturn:
    """Run the tests against the program at the other end of `peer`, write the results, and end this process.

    Args:
        tests: code.
        under_test: names that are the program's, whatever else they mean; others are found in the tests.
        peer: the program.
        results: a descriptor for a line per test.
    """
    try:
        ready = peer.receive() == "ready"
    except BrokenWire:
        ready = False
    if ready:
        names = TestNames(Session(peer, _end_process), trusted_names(tests) - {*under_test}, class_names(tests))
        for name in free_names(tests):  # a class body looks them up where nothing can be missing
            with contextlib.suppress(Exception):
                names[name]
        sys.modules["__main__"] = _MainModule(names)
        for test in tests:
            names.session.failed = False
            os.write(results, b"1\n" if _passes(test, names) and not names.session.failed else b"0\n")
    _end_process()


def _end_process() -> NoReturn:
    """End without the tests' leave: those that have not passed by now fail."""
    os._exit(0)


def _passes(test: str, names: TestNames) -> bool:
    try:
        exec(compile(test, "<test>", "exec"), names)  # noqa: S102  # it is what this process is for
    except SystemExit as end:  # `unittest.main()` ends so; a program cannot raise it here
        return not end.code
    except BaseException:
        return False
    return True


class TestNames(dict[str, Any]):
    """The names that tests see: their own, Python's, and those that the program defines at this moment."""

    def __init__(self, session: Session, trusted: set[str], classes: set[str]) -> None:
        super().__init__(__name__="__main__", __builtins__=builtins)
        self.session, self.trusted, self.classes = session, trusted, classes

    def __missing__(self, name: str) -> Any:
        if name in self.trusted:
            return self._library(name)
        try:
            value = self.session.request("name", name)
        except KeyError:
            raise NameError(f"the program does not define {name!r}") from None  # nor is Python's meant
        if isinstance(value, ProgramClass) and name in self.classes:
            value = ProgramClass(self.session, value._number, own=True)
        if isinstance(value, (ProgramObject, type)):
            self[name] = value
        return value

    def _library(self, name: str) -> Any:
        """Return a module, or a name of one, that a test uses without importing it."""
        if hasattr(builtins, name):
            raise KeyError(name)  # Python looks there next
        if name in PRELUDE:
            return vars(importlib.import_module(PRELUDE[name]))[name]
        return importlib.import_module(ALIASES.get(name, name))


class _MainModule(types.ModuleType):
    """`__main__` as libraries look it up: with the names of the tests."""

    def __init__(self, names: TestNames) -> None:
        super().__init__("__main__")
        self._names = names

    def __getattr__(self, name: str) -> Any:
        if name in self._names:  # `unittest` also asks for functions that a program might define
            return self._names[name]
        raise AttributeError(name)

    def __dir__(self) -> list[str]:
        return list(self._names)
