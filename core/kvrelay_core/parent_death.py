"""Ties a process to its parent: when the parent dies, however it dies, the kernel kills the child. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

from kvrelay_core.errors import WorkerLostError

_PR_SET_PDEATHSIG = 1


def parent_death_tie(parent_pid: int) -> Callable[[], None]:
    """What the child has to call: by itself, or as the `preexec_fn` that its parent gives to subprocess.

    It raises WorkerLostError if the parent is gone already. The kernel watches the thread that started the child:
    a parent starts it from a thread that lives as long as itself.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # loaded now: after a fork the child only makes the call

    def tie() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent_pid:
            raise WorkerLostError("the parent process ended while its child was starting")

    return tie
