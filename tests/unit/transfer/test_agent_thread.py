"""The thread that owns what only one thread may use."""

from __future__ import annotations

import threading

import pytest

from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.agent_thread import AgentThread


def test_everything_happens_on_the_one_thread_and_jobs_are_looked_after() -> None:
    seen: list[str] = []
    looked = threading.Semaphore(0)

    def look_after() -> float:
        seen.append(threading.current_thread().name)
        looked.release()
        return 60.0

    thread = AgentThread("test-agent", look_after)
    assert looked.acquire(timeout=10)
    assert thread.call(lambda: threading.current_thread().name, 10.0) == "test-agent"
    assert looked.acquire(timeout=10), "a job is followed by a look, however long the pause"
    thread.close()
    assert set(seen) == {"test-agent"}


def test_a_look_comes_again_after_the_pause_it_asked_for() -> None:
    looked = threading.Semaphore(0)

    def look_after() -> float:
        looked.release()
        return 0.001

    thread = AgentThread("test-agent", look_after)
    for _ in range(4):
        assert looked.acquire(timeout=10)
    thread.close()


def test_a_call_raises_what_its_function_raises() -> None:
    thread = AgentThread("test-agent", lambda: 60.0)

    def fail() -> None:
        raise TransferError("refused")

    with pytest.raises(TransferError, match="refused"):
        thread.call(fail, 10.0)
    assert thread.call(lambda: 7, 10.0) == 7, "the thread goes on"
    thread.close()


def test_a_call_that_is_not_reached_in_time_does_not_happen() -> None:
    gate = threading.Event()
    called: list[int] = []
    thread = AgentThread("test-agent", lambda: 60.0)
    thread.post(lambda: gate.wait(timeout=10))
    with pytest.raises(TransferError, match="test-agent was busy for"):
        thread.call(lambda: called.append(1), 0.001)
    gate.set()
    thread.close()
    assert called == []
