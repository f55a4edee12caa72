"""A confined process for one generated program: run as a script, by `rlhf_core.reward.code`; imports nothing of ours.

Reads a job from its standard input, confines itself, runs the solution and then each test, and writes which tests
passed. What it takes away, before any generated code runs:

* network and stray processes: own user, network and process namespaces; everything inside ends with the first process;
* files: Landlock lets it read Python and system libraries, and write in its own empty folder alone;
* resources: CPU seconds, memory, file size, open files.

This keeps mistakes and ordinary mischief away from the machine. It is not a boundary against a determined attacker: run
untrusted policies inside a container or a virtual machine as well.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on every architecture
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # rights that make sense for a single file
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CANNOT = 97
"""Exit code: this kernel does not allow confinement."""

libc = ctypes.CDLL(None, use_errno=True)


class Ruleset(ctypes.Structure):
    """`struct landlock_ruleset_attr`: what is forbidden unless a rule allows it."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64))


class Beneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`: what is allowed below a path."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def main() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # of the thread that waits for the answer
    job = json.load(sys.stdin)
    answers = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    limit(job["seconds"], job["memory"] << 20)
    if job["confine"]:
        alone = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID) == 0
        if alone and (child := os.fork()):  # the child is the first process of its namespace
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        if alone:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if not restrict_files(".", and_network=not alone):
            os._exit(CANNOT)
    os.write(answers, json.dumps([job["nonce"], run_tests(job["solution"], job["tests"])]).encode())
    os._exit(0)


def run_tests(solution: str, tests: list[str]) -> list[bool]:
    """Whether each test runs without an exception after the solution."""
    names: dict[str, object] = {"__name__": "__main__"}
    if not run_code(solution, names):
        return [False] * len(tests)
    return [run_code(test, names) for test in tests]


def run_code(code: str, names: dict[str, object]) -> bool:
    try:
        exec(compile(code, "<generated>", "exec"), names)  # noqa: S102  # it is what this child is for, under limits
    except BaseException:  # generated code may raise SystemExit or KeyboardInterrupt too
        return False
    return True


def limit(seconds: float, memory: int) -> None:
    """Resource limits of this process and what it starts."""
    cpu = int(seconds) + 1
    for what, much in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (much, much))


def restrict_files(folder: str, and_network: bool) -> bool:
    """Landlock: reading of libraries, writing in `folder`, no TCP if `and_network`. False if the kernel cannot."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < (4 if and_network else 1):
        return False
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1
    rules = Ruleset(files, 3 if and_network else 0)
    size = ctypes.sizeof(Ruleset) if version >= 4 else 8
    handle = libc.syscall(CREATE_RULESET, ctypes.byref(rules), size, 0)
    readable = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/dev/null", "/dev/zero", "/dev/urandom", *sys.path]
    allow(handle, folder, files)
    for path in {*readable, sys.prefix, sys.base_prefix, sys.exec_prefix}:
        allow(handle, path, READ & files)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return bool(libc.syscall(RESTRICT_SELF, handle, 0) == 0)


def allow(handle: int, path: str, rights: int) -> None:
    """Add a rule for `path`, if it exists."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rule = Beneath(rights if os.path.isdir(path) else rights & OF_FILES, descriptor)  # noqa: PTH112  # starts quickly
    libc.syscall(ADD_RULE, handle, 1, ctypes.byref(rule), 0)
    os.close(descriptor)


if __name__ == "__main__":
    main()
