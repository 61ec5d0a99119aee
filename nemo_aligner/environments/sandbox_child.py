# SPDX-License-Identifier: Apache-2.0
"""Runs inside the sandbox: gives up all but reading and computing, then executes a text as Python.

Its source is given to an interpreter by ``-c``, with two descriptors: of the job in JSON, and of where a line of JSON
goes for each expression, the ``repr`` of its value or null.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

# By name: the numbers on x86-64 and aarch64. What is not here is refused: files that are written, made or removed,
# sockets, processes, threads, signals to others.
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, None),
    "ppoll": (271, 73),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "select": (23, None),
    "pselect6": (270, 72),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "uname": (63, 160),
    "fcntl": (72, 25),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "lstat": (6, None),
    "statfs": (137, 43),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "newfstatat": (262, 79),
    "set_robust_list": (273, 99),
    "getrandom": (318, 278),
    "statx": (332, 291),
    "rseq": (334, 293),
}
OPENAT = (257, 56)
READING = os.O_CLOEXEC | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW | 0o100000 | 0o400000  # O_LARGEFILE
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH

_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06  # of BPF's machine
_NUMBER, _ARCH, _THIRD = 0, 4, 32  # places in seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: EPERM
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def instructions(machine: str) -> bytes:
    """The filter of system calls: what is allowed on a machine, and no file but to be read."""
    column, arch = ARCHITECTURES[machine]
    allowed = [numbers[column] for numbers in ALLOWED.values() if numbers[column] is not None]
    steps = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    for number in allowed:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    steps += [(_EQUAL, 1, 0, OPENAT[column]), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, _THIRD)]
    steps += [(_AND, 0, 0, ~READING & 0xFFFFFFFF), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
    steps += [(_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def limit(name: str, most: int) -> None:
    """Hold this process and its children to so much of what RLIMIT_... names, or to less where that holds already."""
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _give_up(limits: dict[str, int]) -> None:
    """Nothing that this process does afterwards gets it back."""
    for name, most in limits.items():
        limit(name, most)
    code = instructions(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(code) // 8, code)
    for call in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)),
    ):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "this kernel has no seccomp, without which nothing is executed")


def main() -> None:
    """Execute the job."""
    with open(int(sys.argv[1]), encoding="utf-8") as file:
        job = json.load(file)
    results = int(sys.argv[2])
    sys.argv = ["response.py"]
    _give_up(job["limits"])
    os.write(results, b"\n")  # ready
    names = {"__name__": "__main__"}
    exec(compile(job["source"], "response.py", "exec"), names)
    for expression in job["expressions"]:
        try:
            found = repr(eval(expression, names))
        except Exception:
            found = None
        os.write(results, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    main()
