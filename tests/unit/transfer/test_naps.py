"""Naps: what the kernel was asked for, and for which thread."""

from __future__ import annotations

import ctypes
import threading

from kvrelay_transfer.naps import allow_naps, nap

PR_GET_TIMERSLACK = 30


def slack_ns() -> int:
    slack: int = ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0)
    return slack


def test_only_the_thread_that_asks_wakes_up_punctually() -> None:
    found: list[int] = []

    def ask() -> None:
        allow_naps()
        nap()
        found.append(slack_ns())

    before = slack_ns()
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    assert found == [1]
    assert slack_ns() == before > 1
