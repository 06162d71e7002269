"""The engine's end of the two ZeroMQ pipes to its service: commands come in, events go out.

Both connect to endpoints that the service has bound. There is one service in an engine's life: when its end
goes away, `check_service` says so and the engine exits. Knows no message but by its encoding.
"""

from __future__ import annotations

import contextlib
import select
from types import TracebackType

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from kvrelay_core.errors import InternalError, WorkerLostError
from kvrelay_engine.encoder_messages import Pulse
from kvrelay_engine.messages import EngineCommand, Event

_LINGER_MS = 1000  # for the last events: why a start failed


class ServicePulse:
    """Implements `pulse.PulseSocket`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], events_endpoint: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.linger = 0
        self._socket.connect(events_endpoint)
        self._message = msgspec.msgpack.encode(Pulse())

    def pulse(self) -> None:
        with contextlib.suppress(zmq.Again):  # nobody reads: there will be another one
            self._socket.send(self._message, zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()


class ServiceLink:
    def __init__(self, commands_endpoint: str, events_endpoint: str) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineCommand)
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._events = self._context.socket(zmq.PUSH)
        for socket in (self._commands, self._events):
            socket.set_hwm(0)  # bounded by what the service has open, not by dropping or blocking
            socket.linger = _LINGER_MS
        self._monitor = self._commands.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECTED)
        self.was_connected = False
        self._events_endpoint = events_endpoint
        self._commands.connect(commands_endpoint)
        self._events.connect(events_endpoint)

    def __enter__(self) -> ServiceLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open_pulse(self) -> ServicePulse:
        """For a thread beside the one that has the link; to be closed by it, before the link is."""
        return ServicePulse(self._context, self._events_endpoint)

    def emit(self, event: Event) -> None:
        """Never blocks."""
        self._events.send(self._encoder.encode(event), zmq.NOBLOCK)

    def receive(self, timeout_s: float) -> list[EngineCommand]:
        """All commands that are here; waits for the first of them up to the timeout."""
        commands = self._drain()
        if not commands and timeout_s > 0:
            # Not zmq's own poll: it counts in whole milliseconds. The descriptor turns readable once per change,
            # which is enough because `_drain` reads until there is nothing left.
            select.select([int(self._commands.fd), int(self._monitor.fd)], [], [], timeout_s)
            commands = self._drain()
        return commands

    def check_service(self) -> None:
        """Raises WorkerLostError when the service's end was there and is gone."""
        while True:
            try:
                message = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if parse_monitor_message(message)["event"] == zmq.EVENT_DISCONNECTED:
                raise WorkerLostError("the service has closed its end of the command pipe")
            self.was_connected = True

    def _drain(self) -> list[EngineCommand]:
        commands: list[EngineCommand] = []
        while True:
            try:
                commands.append(self._decoder.decode(self._commands.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return commands
            except msgspec.DecodeError as error:
                raise InternalError(f"the service sent a command that this engine cannot read: {error}") from error

    def close(self) -> None:
        self._commands.disable_monitor()
        self._monitor.close(linger=0)
        self._commands.close(linger=0)
        self._events.close()
        self._context.term()
