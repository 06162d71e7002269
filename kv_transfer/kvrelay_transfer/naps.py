"""Pauses of about 15 microseconds, for a thread that waits for something that is nearly there.

Spinning would keep the interpreter from every other thread, and an ordinary sleep takes 60 microseconds: Linux may add
50 to each, unless the thread asks for less.
"""

from __future__ import annotations

import ctypes
import time

_NAP_S = 5e-6
_PR_SET_TIMERSLACK = 29
_SLACK_NS = 1


def allow_naps() -> None:
    """To be called once by each thread that takes them; all its sleeps end more punctually then."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)


def nap() -> None:
    """Gives the interpreter away for a moment."""
    time.sleep(_NAP_S)
