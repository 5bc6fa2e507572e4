"""Keeps little of the memory that the agent, which runs on every node, needs in its first seconds alone."""

from __future__ import annotations

import ctypes
from typing import Final

# malloc.h of glibc
_M_TRIM_THRESHOLD: Final = -1
_M_ARENA_MAX: Final = -8


def configure() -> None:
    """One heap for all threads, and no hoard at its end. To be called before there are threads; other C
    libraries than glibc are left as they are."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
