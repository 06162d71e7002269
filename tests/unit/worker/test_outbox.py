from __future__ import annotations

import asyncio

import pytest

from kvrelay_core.errors import OverloadedError, WorkerLostError
from kvrelay_worker.outbox import Outbox


async def test_messages_come_out_in_order_and_then_it_ends() -> None:
    outbox: Outbox[int] = Outbox()
    for number in range(3):
        outbox.put(number)
    outbox.close()
    outbox.put(9)
    assert [number async for number in outbox] == [0, 1, 2]


async def test_a_waiting_reader_wakes_up() -> None:
    outbox: Outbox[int] = Outbox()
    reader = asyncio.ensure_future(anext(outbox))
    await asyncio.sleep(0)
    outbox.put(1)
    assert await reader == 1


async def test_closing_with_an_error_delivers_what_is_queued_first() -> None:
    outbox: Outbox[int] = Outbox()
    outbox.put(1)
    outbox.close(WorkerLostError("gone"))
    assert await anext(outbox) == 1
    with pytest.raises(WorkerLostError):
        await anext(outbox)


async def test_a_reader_too_far_behind_gets_a_typed_error_instead_of_the_queue() -> None:
    calls: list[str] = []
    outbox: Outbox[int] = Outbox(limit=2, on_overflow=lambda: calls.append("overflow"))
    for number in range(5):
        outbox.put(number)
    assert (len(outbox), outbox.is_closed, calls) == (0, True, ["overflow"])
    with pytest.raises(OverloadedError, match="2 messages behind"):
        await anext(outbox)
