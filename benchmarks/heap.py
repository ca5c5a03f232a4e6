"""A heap that keeps what is freed, as a GPU's caching allocator does.

glibc gives large blocks back to the system and asks for them again. Whether a step's buffers are then paged in anew
hangs on what else lies on the heap: 0 or 8,193 page faults for one eager log-softmax of 256 × 32,768 logits, by one
block left on top of it, and with them a time that differs severalfold between two runs and not at all within one.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
HUGE = 2**31 - 1
READY = 512 << 20  # bytes that are paged in beforehand: a heap that grows as it is used takes dozens of steps to settle


def keep_freed() -> bool:
    """From now on freed memory stays in the process, and half a GiB of it is there; whether so: only with glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, HUGE)):
        return False
    libc.malloc.restype = ctypes.c_void_p
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(READY)))
    if block:
        ctypes.memset(block, 1, READY)
        libc.free(block)
    return True
