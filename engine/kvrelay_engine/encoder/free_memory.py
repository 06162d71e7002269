"""Memory that was freed goes back to the system, where the C library would keep it for the thread that had it."""

from __future__ import annotations

import ctypes


def give_back_free_memory() -> None:
    """Takes some milliseconds, without the interpreter's lock. Does nothing where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
