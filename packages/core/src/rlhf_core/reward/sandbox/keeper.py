"""The keeper of one sample: starts the confined processes, ends them in time, and reports what they answered.

Reads the job in two parts, the program's and the tests'; what reads the second has no child that runs the program.
Nothing that the program can write to is read as a verdict: results of tests come from the process of the tests, and an
output is only an output.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf_core.reward.sandbox import confinement
from rlhf_core.reward.sandbox.confinement import Limits
from rlhf_core.reward.sandbox.examiner import examine
from rlhf_core.reward.sandbox.program import run_script, serve
from rlhf_core.reward.sandbox.wire import Peer

__all__ = ["OUTPUT_BYTES", "main", "pack"]

OUTPUT_BYTES = 16 << 20
"""Total size limit of the outputs of a program."""


def pack(part: Any) -> bytes:
    """Return a part of a job as `main` reads it."""
    data = json.dumps(part).encode()
    return len(data).to_bytes(8, "big") + data


def main() -> None:
    """Read a job from standard input, do it, and write the answer to standard output.

    The job is `{"kind": "tests" or "scripts", "program": code, "seconds": float, "memory": bytes, "layers": [...]}`, then
    `{"tests": [code], "under_test": [name]}` or `{"inputs": [text]}`. The answer is `{"open": [...], "results": [...]}`:
    what the processes were not kept from, and for each test True or False, for each input `[output, True if the exit
    code was 0]` or None if it did not end.
    """
    job = _read_part()
    confinement.become_nobody()
    confinement.end_with_parent()
    keeper = _Keeper(job["program"], Limits(job["seconds"], job["memory"]), job["layers"])
    results = keeper.run_tests() if job["kind"] == "tests" else keeper.run_scripts()
    answer = {"open": sorted(keeper.open), "results": results}
    data = memoryview(json.dumps(answer).encode())
    while data:
        data = data[os.write(1, data) :]
    os._exit(0)  # taking an interpreter apart costs more than the rest of this


def _read_part() -> Any:
    """Read one part and not a byte more: the next is none of the program's business."""
    return json.loads(_read_bytes(int.from_bytes(_read_bytes(8), "big")))


def _read_bytes(count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            sys.exit("the job ended early")
        data += part
    return bytes(data)


class _Process(NamedTuple):
    """A confined process that has been started."""

    child: int
    """the child of this process: it, or the one that waits for it"""
    status: int
    """a descriptor to read its own number and what it is not kept from"""


class _Keeper:
    """State shared by the processes of one program."""

    def __init__(self, program: str, limits: Limits, layers: Sequence[str]) -> None:
        self.program, self.limits, self.layers = program, limits, layers
        self.output_bytes = OUTPUT_BYTES
        self.deadline = time.monotonic() + limits.seconds
        self.open: set[str] = set()

    def run_tests(self) -> list[bool]:
        """Run the tests that the second part holds, against the program as a server."""
        requests, to_program = os.pipe()
        from_program, replies = os.pipe()
        program = self._start((requests, replies), lambda: serve(self.program, requests, replies))
        part = _read_part()
        tests, under_test = part["tests"], part["under_test"]
        results, to_results = os.pipe()
        peer = Peer(from_program, to_program)
        examiner = self._start(
            (from_program, to_program, to_results), lambda: examine(tests, under_test, peer, to_results)
        )
        for descriptor in (requests, to_program, from_program, replies, to_results):
            os.close(descriptor)
        lines = self._read_until_end(results, 2 * len(tests))
        for process in (examiner, program):
            self._end(process)
        passed = [line == b"1" for line in lines.splitlines()]
        return passed + [False] * (len(tests) - len(passed))

    def run_scripts(self) -> list[tuple[str, bool] | None]:
        """Run the program as a script on each input that the second part holds."""
        results: list[tuple[str, bool] | None] = []
        for text in _read_part()["inputs"]:
            late = time.monotonic() >= self.deadline or self.output_bytes < 0
            results.append(None if late else self._run_script(text))
        return results

    def _run_script(self, text: str) -> tuple[str, bool] | None:
        given = os.memfd_create("input")
        os.write(given, text.encode(errors="replace"))
        os.lseek(given, 0, os.SEEK_SET)
        output, to_output = os.pipe()
        script = self._start((), lambda: run_script(self.program), (given, to_output))
        os.close(given)
        os.close(to_output)
        written = self._read_until_end(output, self.output_bytes)
        os.close(output)
        self.output_bytes -= len(written)
        status = self._end(script, wait=self.output_bytes >= 0)
        return None if status is None else (written.decode(errors="replace"), status == 0)

    def _start(self, descriptors: tuple[int, ...], body: Callable[[], None], streams: tuple[int, ...] = ()) -> _Process:
        """Start `body` in a confined process with these descriptors, and these standard streams; the rest are empty."""
        status, to_status = os.pipe()
        child = os.fork()
        if child:
            os.close(to_status)
            return _Process(child, status)
        empty = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(streams[number] if number < len(streams) else empty, number)
        _close_all_but({*descriptors, to_status})
        confinement.count_as_nobody()
        isolated = "namespaces" in self.layers and confinement.isolate()
        if isolated and (inner := os.fork()):  # the first process of its namespaces
            confinement.end_with_parent()
            os.write(to_status, f"{inner}\n".encode())
            os.close(to_status)
            _, result = os.waitpid(inner, 0)
            os._exit(os.waitstatus_to_exitcode(result) & 0xFF)
        missing = confinement.confine(self.limits, isolated, self.layers)
        os.write(to_status, f"{json.dumps(missing)}\n".encode())
        os.close(to_status)
        body()
        sys.exit()  # scripts may have threads and functions for the exit

    def _read_until_end(self, descriptor: int, most: int) -> bytes:
        """Read until the other side ends, the deadline, or `most` bytes and one more."""
        data = bytearray()
        while len(data) <= most and (left := self.deadline - time.monotonic()) > 0:
            if select.select([descriptor], [], [], left)[0]:
                part = os.read(descriptor, 1 << 16)
                if not part:
                    break
                data += part
        return bytes(data)

    def _end(self, process: _Process, wait: bool = False) -> int | None:
        """End a process, if `wait` not before the deadline. Return its exit code, None if it had to be ended."""
        numbers = self._read_status(process)
        while True:
            ended, status = os.waitpid(process.child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if not wait or time.monotonic() >= self.deadline:
                break
            time.sleep(0.001)
        for number in (*numbers, process.child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        os.waitpid(process.child, 0)
        return None

    def _read_status(self, process: _Process) -> list[int]:
        """Note what a process is not kept from. Return its own number, where that is not its starter's."""
        data = bytearray()
        while part := os.read(process.status, 1 << 12):
            data += part
        os.close(process.status)
        lines = [json.loads(line) for line in data.splitlines()]
        if not any(isinstance(line, list) for line in lines):
            sys.exit("a process could not be confined")
        self.open.update(*(line for line in lines if isinstance(line, list)))
        return [line for line in lines if isinstance(line, int)]


def _close_all_but(descriptors: set[int]) -> None:
    """Close all descriptors but the standard streams and these."""
    low = 3
    for number in sorted(descriptors):
        os.closerange(low, number)
        low = number + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
