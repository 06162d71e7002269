"""The time limit of writes to clients, on a loop whose time stands still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kvrelay_router.write_limit import WriteLimit


class StillLoop:
    """Timers fire when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        return self.call_at(self.now_s + delay_s, callback)

    def call_at(self, due_s: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self, due_s, callback))
        return self.timers[-1]

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for timer in [timer for timer in self.timers if timer.due_s <= self.now_s]:
            timer.cancel()
            timer.callback()


class Timer:
    def __init__(self, loop: StillLoop, due_s: float, callback: Callable[[], None]) -> None:
        self.loop, self.due_s, self.callback = loop, due_s, callback

    def cancel(self) -> None:
        self.loop.timers.remove(self)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> StillLoop:
    still = StillLoop()
    monkeypatch.setattr("kvrelay_router.write_limit.asyncio.get_running_loop", lambda: still)
    return still


async def test_many_writes_may_take_longer_than_one(loop: StillLoop) -> None:
    async with WriteLimit(1.0) as limit:
        for _ in range(20):
            limit.begin()
            loop.advance(0.4)
            limit.end()
            assert len(loop.timers) <= 1
        loop.advance(50)  # nothing is being written
        await asyncio.sleep(0)
        limit.begin()
        limit.end()
    assert not loop.timers


async def write_twice(loop: StillLoop) -> None:
    """The second time for 1.1 s."""
    async with WriteLimit(1.0) as limit:
        limit.begin()
        loop.advance(0.9)
        limit.end()
        limit.begin()
        loop.advance(0.9)
        await asyncio.sleep(0)  # a cancellation would come here
        loop.advance(0.2)
        await asyncio.Event().wait()


async def test_one_write_that_takes_too_long_is_ended(loop: StillLoop) -> None:
    with pytest.raises(TimeoutError):
        await write_twice(loop)
    assert loop.now_s == pytest.approx(102.0)
    assert not loop.timers
