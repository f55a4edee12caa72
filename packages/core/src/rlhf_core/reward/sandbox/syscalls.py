"""Seccomp: a process may use the system calls of a computation, and none that starts a process or reaches another.

libseccomp knows the numbers of each architecture. It is on every machine with systemd or apt, and has no Python package
on PyPI, hence `ctypes`.
"""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["restrict_syscalls"]

FREE = """
    read write readv writev pread64 pwrite64 preadv pwritev lseek _llseek close close_range dup dup2 dup3 pipe pipe2
    open openat creat stat fstat lstat newfstatat fstatat64 stat64 fstat64 lstat64 statx access faccessat faccessat2
    statfs fstatfs statfs64 fstatfs64 readlink readlinkat getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir
    unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat chmod fchmod fchmodat umask truncate
    ftruncate truncate64 ftruncate64 fallocate fadvise64 fsync fdatasync flock utime utimes utimensat futimesat
    sendfile copy_file_range
    mmap mmap2 munmap mprotect mremap madvise brk membarrier
    futex set_robust_list get_robust_list rseq set_tid_address sched_yield sched_getaffinity sched_getparam
    sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu getpriority get_mempolicy
    exit exit_group rt_sigreturn rt_sigaction rt_sigprocmask rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack
    sigreturn restart_syscall pause alarm setitimer getitimer timerfd_create timerfd_settime timerfd_gettime
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage
    select _newselect pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    eventfd eventfd2 socketpair sendto recvfrom sendmsg recvmsg shutdown getsockopt getsockname getpeername
    getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp getpgid getsid
    uname sysinfo getrlimit ugetrlimit setrlimit getrandom arch_prctl wait4 waitid
""".split()
"""System calls with any arguments."""

CLONE_THREAD = 0x10000
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)  # descriptors, flags, locks, the size of a pipe; no signals, no leases
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, its size; bytes to read; flags
PRCTL = (15, 16, 0x53564D41)  # names of threads and of memory
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EQUAL, MASKED_EQUAL = 4, 7


class Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`: a condition on one argument."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("first", ctypes.c_uint64), ("second", ctypes.c_uint64))


def restrict_syscalls() -> bool:
    """Forbid all other system calls of this process and its threads. Return False if that is impossible here."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return False
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(ERRNO | errno.ENOSYS))  # libc tries an older call then
    if not rules:
        return False

    def allow(name: str, *conditions: Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # this architecture has it
            library.seccomp_rule_add_array(rules, ALLOW, number, len(conditions), (Comparison * 4)(*conditions))

    for name in FREE:
        allow(name)
    allow("clone", Comparison(0, MASKED_EQUAL, CLONE_THREAD, CLONE_THREAD))
    for name, argument, values in (
        ("fcntl", 1, FCNTL),
        ("fcntl64", 1, FCNTL),
        ("ioctl", 1, IOCTL),
        ("prctl", 0, PRCTL),
        ("kill", 0, (os.getpid(),)),
        ("tgkill", 0, (os.getpid(),)),
        ("prlimit64", 0, (0, os.getpid())),
    ):
        for value in values:
            allow(name, Comparison(argument, EQUAL, value, 0))
    failed = library.seccomp_load(rules)
    library.seccomp_release(rules)
    return not failed
