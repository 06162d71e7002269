"""How long steps wait for KV that is about to be whole."""

from __future__ import annotations

import pytest

from kvrelay_core.clock import ManualClock
from kvrelay_engine.arrival_wait import MAX_WAIT_S, SHARE, ArrivalWait


def test_waits_stay_a_small_share_of_the_time() -> None:
    clock = ManualClock()
    wait = ArrivalWait(clock)
    waited_s = 0.0
    for _ in range(1000):
        allowed_s = wait.allowed_s()
        assert allowed_s <= MAX_WAIT_S
        wait.spend(allowed_s)
        waited_s += allowed_s
        clock.advance(0.005)
    assert waited_s == pytest.approx(SHARE * 5.0, rel=0.05)


def test_what_was_overspent_is_paid_back_first() -> None:
    clock = ManualClock()
    wait = ArrivalWait(clock)
    wait.spend(2 * MAX_WAIT_S)
    assert wait.allowed_s() == 0.0
    clock.advance(MAX_WAIT_S / SHARE)
    assert wait.allowed_s() == pytest.approx(0.0)
    clock.advance(10.0)
    assert wait.allowed_s() == MAX_WAIT_S
