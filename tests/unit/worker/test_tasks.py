from __future__ import annotations

import asyncio
import logging

import pytest

from kvrelay_worker.tasks import TaskOwner


async def test_close_ends_every_task_also_one_that_is_spawned_meanwhile() -> None:
    owner = TaskOwner()
    ended: list[str] = []

    async def wait_for_ever(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)
            if name == "first":
                owner.spawn(wait_for_ever("late"), "late")

    owner.spawn(wait_for_ever("first"), "first")
    owner.spawn(wait_for_ever("second"), "second")
    await asyncio.sleep(0)
    await owner.close()
    assert len(owner) == 0
    assert set(ended) >= {"first", "second"}


async def test_a_crash_is_logged_with_the_name_of_the_task(caplog: pytest.LogCaptureFixture) -> None:
    owner = TaskOwner()

    async def crash() -> None:
        raise ValueError("boom")

    with caplog.at_level(logging.ERROR):
        await asyncio.wait([owner.spawn(crash(), "the reader")])
        await asyncio.sleep(0)
    assert len(owner) == 0
    assert "the reader crashed" in caplog.text
