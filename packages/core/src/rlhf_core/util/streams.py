"""Standard output and error that a command outlives: who reads them may go away while there is work to do.

`rlhf-run grpo … | head -1` and a terminal that was closed must not end a run, nor a `BrokenPipeError` of anything else pass for
their end. So the two streams of the process are replaced: output without a reader is dropped.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

__all__ = ["outlive_readers"]


class _Outliving(io.FileIO):
    """A descriptor whose bytes are dropped once writing fails."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.failure: OSError | None = None
        """reason why bytes were lost; None if there was no reader or no loss"""

    def write(self, content: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            return super().write(content)
        except BrokenPipeError:
            pass  # the reader went away
        except OSError as error:
            self.failure = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for libraries that write to the descriptor themselves
        os.close(nowhere)
        return len(content)


def _open_missing_streams() -> None:
    """Open standard streams that were closed (`>&-`) on nothing, lest a file of the run gets their number and their text."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@contextmanager
def outlive_readers() -> Iterator[Callable[[], OSError | None]]:
    """While the block runs, writing to the process's standard output and error never raises.

    Streams that others have put in their place, as tests and notebooks do, are left alone.

    Yields:
        a function that returns why text on standard output was lost; None if none was, or its reader went away.
    """
    _open_missing_streams()
    before, output = (sys.stdout, sys.stderr), _Outliving(1)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text_stream(output, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text_stream(_Outliving(2), sys.stderr)

    def failure() -> OSError | None:
        sys.stdout.flush()
        return output.failure

    try:
        yield failure
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _text_stream(raw: _Outliving, stream: TextIO | None) -> io.TextIOWrapper:
    """A text stream that writes to `raw` as `stream` did; it may be closed."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(cast("io.RawIOBase", raw)),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty() or raw.fileno() == 2,
    )
