"""The engine does not outlive its service, whatever killed it: the kernel sends SIGKILL when the parent ends."""

from __future__ import annotations

import ctypes
import os
import signal

from kvrelay_core.errors import WorkerLostError

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """`parent_pid` is what `os.getppid()` said first. Raises WorkerLostError if the parent is gone already.

    The kernel watches the thread that started us: a service starts its engine from its main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        raise WorkerLostError("the service ended while its engine was starting")
