"""Signs of life while the loop computes, and only then."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from kvrelay_core.clock import ManualClock
from kvrelay_engine.pulse import PulseThread
from kvrelay_engine.service_link import ServiceLink

WAIT_S = 10.0  # for a thread that needs milliseconds
PULSE_S = 0.01


class Socket:
    def __init__(self) -> None:
        self.pulses: queue.Queue[None] = queue.Queue()
        self.is_closed = False

    def pulse(self) -> None:
        self.pulses.put(None)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def socket() -> Socket:
    return Socket()


@pytest.fixture
def thread(socket: Socket, clock: ManualClock) -> Iterator[PulseThread]:
    thread = PulseThread(lambda: socket, clock, pulse_s=PULSE_S, max_compute_s=60.0)
    yield thread
    thread.close()
    assert socket.is_closed


def assert_still(socket: Socket) -> None:
    while not socket.pulses.empty():
        socket.pulses.get()
    with pytest.raises(queue.Empty):
        socket.pulses.get(timeout=5 * PULSE_S)


def test_it_pulses_again_and_again_while_something_is_computed(thread: PulseThread, socket: Socket) -> None:
    assert_still(socket)
    for _ in range(2):
        with thread.computing():
            for _ in range(3):
                socket.pulses.get(timeout=WAIT_S)
        assert_still(socket)


def test_what_takes_too_long_counts_as_hung(thread: PulseThread, socket: Socket, clock: ManualClock) -> None:
    with thread.computing():
        socket.pulses.get(timeout=WAIT_S)
        clock.advance(60.0)
        socket.pulses.get(timeout=1)  # one may have been due already
        assert_still(socket)
    with thread.computing():
        socket.pulses.get(timeout=WAIT_S)


def test_it_ends_in_the_middle_of_a_computation(thread: PulseThread, socket: Socket) -> None:
    with thread.computing():
        thread.close()
    assert socket.is_closed


def test_a_pulse_gets_to_the_service(tmp_path: Path) -> None:
    endpoints = [f"ipc://{tmp_path / name}" for name in ("commands", "events")]
    context = zmq.Context()
    commands, events = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    for socket, endpoint in zip((commands, events), endpoints, strict=True):
        socket.linger = 0
        socket.bind(endpoint)
    with ServiceLink(*endpoints) as link:
        thread = PulseThread(link.open_pulse, ManualClock(), pulse_s=PULSE_S)
        with thread.computing():
            assert events.poll(int(1000 * WAIT_S)) and b"Pulse" in events.recv()
        thread.close()
    for socket in (commands, events):
        socket.close()
    context.term()
