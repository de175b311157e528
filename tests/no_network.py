# SPDX-License-Identifier: Apache-2.0
"""Processes that die when they, or any process that they start, open an internet socket: seen by the kernel, so native
code is seen as well."""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Callable

SYSTEM_CALL = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""The kernel's name of each architecture, and its number of socket(2)."""

SUPPORTED = platform.system() == "Linux" and platform.machine() in SYSTEM_CALL

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_NR_AT, _ARCH_AT, _FAMILY_AT = 0, 4, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_INET, _INET6 = 2, 10


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def without_internet() -> Callable[[], None]:
    """A function for `subprocess.Popen(preexec_fn=…)`: from then on, socket(AF_INET or AF_INET6) is SIGSYS."""
    architecture, socket = SYSTEM_CALL[platform.machine()]
    steps = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 0, 5, architecture),
        (_LOAD, 0, 0, _NR_AT),
        (_EQUAL, 0, 3, socket),
        (_LOAD, 0, 0, _FAMILY_AT),
        (_EQUAL, 2, 0, _INET),
        (_EQUAL, 1, 0, _INET6),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    libc = ctypes.CDLL(None, use_errno=True)

    def confine() -> None:
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
            _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0
        ):
            raise OSError(ctypes.get_errno(), "the kernel takes no filter")

    return confine
