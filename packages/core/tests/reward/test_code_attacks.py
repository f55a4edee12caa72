"""Programs that try to win against their tests without solving anything earn nothing.

Each is written against a judge that runs the tests in the program's process, and many beat that one
(`test_attacks_beat_a_judge_in_the_same_process`), so that what is tested here is the judge and not the attack.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from code_cases import read_cases, skip_unless_confined, winners

from rlhf_core.reward.sandbox.confinement import LAYERS

FORGED = """
import os, threading, time
def f(x): return 0
lines = {lines!r}
def write():
    while True:
        for fd in range(3, 64):
            try: os.write(fd, ''.join(lines).encode())
            except OSError: pass
        time.sleep(0.01)
threading.Thread(target=write, daemon=True).start()
time.sleep(0.05)
"""
"""A program that writes to every descriptor it can find what the judge may take for something else."""

MESSAGES = [
    "1\n1\n1\n",
    '["ok", true, [], ""]\n',
    '["raise", [[], ["SystemExit", "BaseException", "object"], [0], "", 0], [], ""]\n',
    '["raise", [[], ["eval"], ["1"], "", 0], [], ""]\n',
    '["raise", [[[0, "E"]], ["KeyboardInterrupt"], [], "", 0], [], ""]\n',
    '["stop", [[], ["StopIteration"], [], "", 0], [], ""]\n',
    '["ok", ["type", "eval"], [], ""]\n',
    '["ok", ["global", "os", "_exit"], [], ""]\n',
    '["ok", ["text", "os", "system", "true"], [], ""]\n',
    '["ok", ["same", -1], [], ""]\n',
    '["ok", null, [[0, [98765]]], ""]\n',
    '["callback", 0, [], {}]\n',
    '["callback", -1, [], {}]\n',
    '{"open": [], "results": [true]}\n',
    "[" * 5000 + "\n",
    '["ok", ' + "[" * 100_000,
    "\x00\xff\n",
    "null\n",
]
CLASS_BODY = """
class E(SystemExit): code = 0
def f(x): raise E(0)
"""

REACH: dict[str, str] = {
    "a file": "open(SECRET).read()",
    "a file through a link": "os.symlink(SECRET, 'link'); open('link').read()",
    "a file through another name": "os.link(SECRET, 'name'); open('name').read()",
    "a file through /proc": "open('/proc/self/root' + SECRET).read()",
    "a file through a system call": "fd = libc.open(SECRET.encode(), 0); os.read(fd, 9)",
    "the list of a folder": "os.listdir(os.path.dirname(SECRET))",
    "a file of the system": "open('/etc/passwd').read()",
    "its environment": "os.environ['RLHF_SECRET']",
    "the environment of another": "open(f'/proc/{os.getppid()}/environ').read()",
    "the memory of another": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "its own memory": "open('/proc/self/mem', 'rb').read(1)",
    "the commands of others": "[open(f'/proc/{n}/cmdline').read() for n in os.listdir('/proc') if n.isdigit()][0]",
    "writing beside the secret": "open(SECRET + '2', 'w')",
    "removing the secret": "os.remove(SECRET)",
    "cutting the secret": "os.truncate(SECRET, 0)",
    "writing into the judge": "open(sys.modules['rlhf_core.reward.sandbox.wire'].__file__, 'a')",
    "writing compiled code": "import py_compile; py_compile.compile(os.__file__, doraise=True)",
    "writing into the library": "open(os.path.dirname(os.__file__) + '/sitecustomize.py', 'w')",
    "a connection": "socket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "a datagram": "socket.socket(2, 2).sendto(b'x', ('127.0.0.1', PORT))",
    "a socket of the machine": "socket.socket(1).connect('\\0' + SECRET)",
    "a server": "socket.socket().bind(('127.0.0.1', 0))",
    "a signal to its parent": "os.kill(os.getppid() or 1, 0) if os.getppid() != 0 else fail()",
    "a signal to all": "os.kill(-1, 0)",
    "a signal to its group": "os.kill(0, 0)",
    "a signal to the judge": "os.kill(JUDGE, 0)",
    "signals by a file": "r, w = os.pipe(); import fcntl; fcntl.fcntl(r, 8, JUDGE)",
    "the limits of another": "resource.prlimit(JUDGE, resource.RLIMIT_CPU)",
    "higher limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "tracing the judge": "check(libc.ptrace(16, JUDGE, 0, 0))",
    "reading the judge": "check(libc.process_vm_readv(JUDGE, BUFFER, 1, BUFFER, 1, 0))",
    "a descriptor of the judge": "os.pidfd_open(JUDGE)",
    "a child": "os.fork()",
    "a program": "subprocess.run(['/bin/true'])",
    "outliving its parent": "check(libc.prctl(1, 0, 0, 0, 0))",
    "leaving its session": "os.setsid()",
    "another user": "os.setuid(0 if os.getuid() else 1)",
    "namespaces": "check(libc.unshare(0x10000000))",
    "a mount": "check(libc.mount(b'x', b'/mnt', b'tmpfs', 0, 0))",
    "another root": "os.chroot('/usr')",
    "shared memory": "check(libc.shmget(0, 4096, 0o1600))",
    "memory in a file": "os.memfd_create('x')",
    "rings": "check(libc.syscall(425, 8, ctypes.byref((ctypes.c_char * 256)())))",
    "a device": "open('/dev/kmsg').read(1)",
    "descriptors of others": "(len([fd for fd in range(3, 64) if is_open(fd)]) > 2 or sys.stdin.read(1)) or fail()",
}
"""What a program tries to reach: code that raises where it can't."""

NEEDS_SECCOMP = {
    *("a signal to its group", "signals by a file", "a child", "a program", "outliving its parent"),
    *("leaving its session", "namespaces", "shared memory", "memory in a file", "rings", "a socket of the machine"),
    *("a datagram", "a server", "a signal to its parent", "a signal to all", "another user"),
}
"""What namespaces and Landlock alone let it do to itself."""

TRY = """
import ctypes, os, resource, socket, subprocess, sys
SECRET, PORT, JUDGE = {secret!r}, {port}, {judge}
libc = ctypes.CDLL(None, use_errno=True)
BUFFER = (ctypes.c_size_t * 4)()
BUFFER[0], BUFFER[1] = ctypes.addressof(BUFFER) + 16, 8
def fail(): raise OSError
def check(result): return result >= 0 or fail()
def is_open(fd):
    try: return os.fstat(fd)
    except OSError: return None
def f():
    {code}
    return 'reached'
"""

NAIVE = """
import json, os, sys
def passes(test, names):
    try: exec(test, names)
    except BaseException: return False
    return True
for program, test in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        names = {"__name__": "__main__"}
        exec(program, names)
        os._exit(0 if passes(test, names) else 1)
    print(os.waitpid(child, 0)[1] == 0)
"""


def test_attacks_beat_a_judge_in_the_same_process() -> None:
    cases = read_cases("same_process")
    run = subprocess.run(
        [sys.executable, "-c", NAIVE, json.dumps(list(cases.values()))], capture_output=True, text=True, check=True
    )
    assert dict(zip(cases, run.stdout.split(), strict=True)) == dict.fromkeys(cases, "True")


def test_what_wins_in_the_same_process_earns_nothing_here() -> None:
    cases = read_cases("same_process")
    assert len(cases) > 25
    assert winners(cases) == []


def test_a_result_does_not_pose_as_what_is_expected() -> None:
    assert winners(read_cases("pose")) == []


def test_the_wire_carries_values_and_nothing_else() -> None:
    test = "assert f(1) == 98765"
    forged = {line[:50]: (FORGED.format(lines=['"ready"\n', line]), test) for line in MESSAGES}
    ended = (FORGED.format(lines=[MESSAGES[2]]) + CLASS_BODY, "for x in map(f, [1]): pass\nelse: raise AssertionError")
    cases = {**read_cases("wire"), **forged, "an exception that ends a loop": ended}
    assert winners(cases, seconds=6) == []


def test_time_memory_and_disk_end() -> None:
    skip_unless_confined()
    cases = read_cases("exhausting")
    started = time.monotonic()
    assert winners(cases, seconds=1.5) == []
    assert time.monotonic() - started < 10 * len(cases)  # a machine may be slow, and none of them ends by itself


@pytest.mark.parametrize(
    ("layers", "open_to"),
    [(LAYERS, set()), (("landlock", "seccomp"), set()), (("namespaces", "landlock"), NEEDS_SECCOMP)],
    ids=["all layers", "no namespaces", "no seccomp"],
)
def test_a_program_reaches_nothing_outside(
    layers: tuple[str, ...], open_to: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_confined()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    monkeypatch.setenv("RLHF_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{secret}")
        local.listen()
        values = {"secret": str(secret), "port": server.getsockname()[1], "judge": os.getpid()}
        attempts = {name: TRY.format(code=code, **values) for name, code in REACH.items() if name not in open_to}
        cases = {name: (program, "assert f() == 'reached'") for name, program in attempts.items()}
        assert winners(cases, layers) == []
    assert secret.read_text() == "secret"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]
