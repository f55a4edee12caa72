"""An end of the process that nothing can catch, and that must not pass for the end of its work.

`os._exit` ends a process at once: no `finally`, no checkpoint, and any exit code, even 0. A plugin may call it,
in a thread too, and a program that forks may reach it in the wrong process. So while a command works, `os._exit` writes
a line first, and 0 becomes 1. Processes that are forked from this one end as they like.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

__all__ = ["leave", "no_silent_exit"]

leave = os._exit
"""The function of Python, for code of core that ends the process on purpose."""


@contextmanager
def no_silent_exit() -> Iterator[None]:
    """While the block runs, let `os._exit` in this process write a line, and never exit with 0."""
    process, before = os.getpid(), os._exit

    def refuse(status: int) -> NoReturn:
        if os.getpid() != process:
            leave(status)
        line = f"rlhf-run: os._exit({status}) was called before the work was done; nothing else was saved\n"
        with suppress(OSError):  # a closed terminal
            os.write(2, line.encode())
        leave(status or 1)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = before
