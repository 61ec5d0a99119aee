# SPDX-License-Identifier: Apache-2.0
"""Finds out whether AMX runs on this CPU before torch is imported, since oneDNN reads its limit only once.

Some virtual machines advertise AMX, and its first instruction kills the process. Knows nothing of torch.
"""

import ctypes
import faulthandler
import mmap
import os
import platform
import re
import resource
from pathlib import Path

LIMIT_VARIABLE = "ONEDNN_MAX_CPU_ISA"
WITHOUT_AMX = "AVX512_CORE_BF16"  # all that a CPU with AMX has besides it, as far as bf16 is concerned

_CPUINFO = Path("/proc/cpuinfo")
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 0x1023, 18
# ldtilecfg [rdi]; tilezero tmm0, tmm1, tmm2; tdpbf16ps tmm0, tmm1, tmm2; tilerelease; ret
_CODE = bytes.fromhex("c4e2784907 c4e27b49c0 c4e27b49c8 c4e27b49d0 c4e26a5cc1 c4e27849c0 c3")
_TILE_ROWS, _TILE_ROW_BYTES = 16, 64


def decide(cpuinfo: Path = _CPUINFO) -> str | None:
    """Keep oneDNN off AMX where it does not run; to be called before torch is imported.

    Returns:
        A line for the log; None where the CPU does not advertise AMX, or the environment sets the limit itself.
    """
    if LIMIT_VARIABLE in os.environ or not _is_advertised(cpuinfo):
        return None
    if amx_runs():
        return "AMX runs on this CPU: bf16 products use it"
    os.environ[LIMIT_VARIABLE] = WITHOUT_AMX
    return f"this CPU advertises AMX, which does not run here: {LIMIT_VARIABLE}={WITHOUT_AMX}"


def _is_advertised(cpuinfo: Path) -> bool:
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return False
    return platform.machine() == "x86_64" and flags is not None and "amx_bf16" in flags[1].split()


def amx_runs() -> bool:
    """True if a bf16 product of two tiles ends well, tried in milliseconds by a child process, which alone may die."""
    child = os.fork()
    if child == 0:
        try:
            _multiply_tiles()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _multiply_tiles() -> None:
    faulthandler.disable()  # the death of this process is a result, not an error to report
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The kernel gives the tiles' state to processes that ask for it.
    if ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA):
        raise OSError("the kernel gives no AMX state")
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_CODE)
    shape = bytearray(64)  # ldtilecfg's operand: palette, then bytes of a row and rows of each tile
    shape[0] = 1
    for tile in range(3):
        shape[16 + 2 * tile], shape[48 + tile] = _TILE_ROW_BYTES, _TILE_ROWS
    operand = (ctypes.c_char * len(shape)).from_buffer(shape)
    entry = ctypes.addressof(ctypes.c_char.from_buffer(code))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry)(ctypes.addressof(operand))
