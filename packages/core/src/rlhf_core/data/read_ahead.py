"""Things made before they are asked for, in order: by a thread, or where they are asked for."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Generic, Protocol, TypeVar

__all__ = ["InPlace", "ReadAhead", "Supply"]

Thing = TypeVar("Thing")
Made = TypeVar("Made", covariant=True)


class Supply(Protocol[Made]):
    """Things in order, some of them made before they are taken."""

    @property
    def is_started(self) -> bool:
        """True if something was asked for."""
        ...

    def take(self) -> Made:
        """Return the next one. Raises what went wrong while it was made, also when it is requested again."""
        ...

    def wait(self) -> None:
        """Return when every one that may be made is made, or one cannot be."""
        ...

    def waiting(self) -> Sequence[Made]:
        """Return those that are made and not taken."""
        ...

    def close(self) -> None:
        """Make no more."""
        ...


class ReadAhead(Generic[Thing]):
    """Items made by a separate thread from the first `take` on; one more whenever one is taken.

    Args:
        make: makes the next one; only the thread calls it.
        ahead: how many are made before they are asked for.
    """

    def __init__(self, make: Callable[[], Thing], ahead: int) -> None:
        self._make = make
        self._ready: Queue[Thing | BaseException] = Queue()
        self._due, self._made = 1 + ahead, 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def is_started(self) -> bool:
        return self._thread is not None

    def take(self) -> Thing:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="data", daemon=True)
            self._thread.start()
        else:
            with self._changed:
                self._due += 1
                self._changed.notify_all()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for later requests
            raise item
        return item

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._made >= self._due or self._closed)

    def waiting(self) -> list[Thing]:
        return [each for each in list(self._ready.queue) if not isinstance(each, BaseException)]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._made < self._due or self._closed)
                if self._closed:
                    return
            try:
                item: Thing | BaseException = self._make()
            except BaseException as error:  # the loop's business
                item = error
            self._ready.put(item)
            with self._changed:
                self._made = (
                    sys.maxsize if isinstance(item, BaseException) else self._made + 1
                )  # nothing after an error
                self._changed.notify_all()


class InPlace(Generic[Thing]):
    """Things made when one is taken, so that ranks which have to agree on them do so in the loop.

    Args:
        make: makes the next one.
        ahead: how many are made before they are asked for.
    """

    def __init__(self, make: Callable[[], Thing], ahead: int) -> None:
        self._make, self._ahead = make, ahead
        self._made: deque[Thing] = deque()
        self._failure: Exception | None = None
        self._is_started = False

    @property
    def is_started(self) -> bool:
        return self._is_started

    def take(self) -> Thing:
        self._is_started = True
        while len(self._made) <= self._ahead and self._failure is None:
            try:
                self._made.append(self._make())
            except Exception as error:  # raised when its turn comes
                self._failure = error
        if not self._made:
            assert self._failure is not None
            raise self._failure
        return self._made.popleft()

    def wait(self) -> None:
        """Return at once: nothing is made elsewhere."""

    def waiting(self) -> list[Thing]:
        return list(self._made)

    def close(self) -> None:
        """Keep what is made."""
