"""The engine process, from its start to its end: `python -m kvrelay_engine.process`, spoken to over ZeroMQ.

The service binds both ends and the engine connects; it exits when they go away. If the engine dies, or its loop
stops beating, it is declared lost for good: the service ends too and a supervisor starts both anew. Long before that it
counts as silent: a step may take its time, but who waits for it may rather go elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import ConfigError, DeadlineError, WorkerLostError
from kvrelay_engine import messages
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.weight_pages import huge_page_environment
from kvrelay_transfer.copy_tuning import copy_environment
from kvrelay_worker.engine_link import EngineLink
from kvrelay_worker.tasks import TaskOwner

log = logging.getLogger(__name__)

MAX_IPC_PATH_BYTES = 100  # of a Unix socket address; the system's limit is 107
EXIT_TIMEOUT_S = 5.0  # from Shutdown to SIGKILL
LOOK_S = 0.25  # between two looks at beats that are overdue
SILENT_AFTER_S = 2.7  # with the interval between looks, three missed beats as for a reader (PROTOCOL B3)
# -P: a working directory with a folder named like one of our imports must not be imported.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "kvrelay_engine.process")


class EngineClient(EngineLink):
    def __init__(
        self,
        run_dir: str,
        worker_id: str,
        clock: Clock,
        *,
        hung_after_s: float,
        silent_after_s: float = SILENT_AFTER_S,
        command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        """`command` starts an engine when `--config FILE` is appended. Files in `run_dir` are named after the
        worker, so that a restart replaces what a killed one left."""
        super().__init__()
        self._run_dir = Path(run_dir)
        self._clock = clock
        self._hung_after_s = hung_after_s
        self._silent_after_s = silent_after_s
        self._command = command
        self._worker_id = worker_id
        self._tasks = TaskOwner()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.EngineEvent)
        self._context: zmq.asyncio.Context | None = None
        self._commands: zmq.Socket[bytes] | None = None
        self._events: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._first: asyncio.Future[messages.Started] | None = None
        self._beat_at_s = 0.0
        self._has_failed_start = False  # the engine said so and is exiting
        self._stopping = False

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    # ------------------------------------------------------------------------------------------------ life

    async def start(self, make_config: Callable[[str, str], EngineConfig], timeout_s: float) -> messages.Started:
        config = make_config(*self._bind())
        path = self._path("engine.json")
        path.write_text(config.to_json())
        self._first = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            "--config",
            str(path),
            stdin=asyncio.subprocess.DEVNULL,
            env=huge_page_environment(copy_environment(os.environ)),
        )
        self._tasks.spawn(self._receive(), "engine events")
        self._tasks.spawn(self._watch_exit(self._process), "engine exit")
        try:
            async with asyncio.timeout(timeout_s):
                started = await self._first
                await self._wait_writable()
        except TimeoutError as error:
            raise DeadlineError(f"the engine was not ready within {timeout_s:g} s; raise start_timeout_s") from error
        self._tasks.spawn(self._watch_beats(), "engine beats")
        return started

    async def stop(self) -> None:
        """Asks the engine to exit, kills it after 5 s, removes every file. Idempotent."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            await self._end_process(self._process)
        await self._tasks.close()
        for socket in (self._commands, self._events):
            if socket is not None:
                socket.close(linger=0)
        if self._context is not None:
            self._context.term()
        self._commands = self._events = self._context = None
        for suffix in ("engine.json", "commands", "events"):
            self._path(suffix).unlink(missing_ok=True)

    async def _end_process(self, process: asyncio.subprocess.Process) -> None:
        try:
            if not self._has_failed_start:  # else it exits by itself, and takes no commands any more
                self.send(messages.Shutdown())
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                await process.wait()
        except (TimeoutError, WorkerLostError):
            log.warning("the engine does not exit by itself; killing it")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # -------------------------------------------------------------------------------------------- messages

    def send(self, command: messages.EngineCommand) -> None:
        if self.loss is not None:
            raise self.loss
        if self._commands is None:
            raise WorkerLostError("the engine is not running")
        try:
            self._commands.send(self._encoder.encode(command), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise WorkerLostError(f"the engine takes no commands: {error}") from error

    async def _receive(self) -> None:
        assert self._events is not None
        while True:
            event = self._decoder.decode(await self._events.recv())
            self._beat_at_s = self._clock.now()
            if isinstance(event, messages.StartFailed):
                self._has_failed_start = True
                self._fail_start(error_of(event.error))
                continue
            self.dispatch(event)
            if isinstance(event, messages.Started):
                assert self._first is not None
                if not self._first.done():
                    self._first.set_result(event)

    async def _wait_writable(self) -> None:
        """The engine's two connections are made in any order; without the second one, sending would fail."""
        assert self._commands is not None
        while not self._commands.poll(0, zmq.POLLOUT):  # noqa: ASYNC110  (ZeroMQ has no event for it)
            await asyncio.sleep(0.005)

    def _fail_start(self, error: Exception) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_exception(error)

    # -------------------------------------------------------------------------------------------- watching

    async def _watch_exit(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if self._stopping:
            return
        # A StartFailed that was sent just before the exit is the better message: let it arrive.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await self._drained()
        error = WorkerLostError(f"the engine process exited with code {code}; its log says why")
        self._fail_start(error)
        self.declare_lost(error)

    async def _drained(self) -> None:
        assert self._first is not None
        if not self._first.done():
            await asyncio.wait([self._first])

    async def _watch_beats(self) -> None:
        """Sleeps until a beat would be overdue; once they are, it looks every `LOOK_S`."""
        self._beat_at_s = self._clock.now()
        was_silent = False
        while True:
            looked_s = self._clock.now()
            silent_s = looked_s - self._beat_at_s
            if silent_s >= self._hung_after_s:
                self.declare_lost(WorkerLostError(f"the engine loop has not moved for {silent_s:.1f} s"))
                return
            is_silent = silent_s >= self._silent_after_s
            if is_silent and not was_silent:
                self.declare_silent(silent_s)
            was_silent = is_silent
            overdue_in_s = min(self._silent_after_s, self._hung_after_s) - silent_s
            sleep_s = LOOK_S if is_silent else max(LOOK_S, overdue_in_s)
            await asyncio.sleep(sleep_s)
            if self._clock.now() - looked_s > sleep_s + LOOK_S:
                self._beat_at_s = self._clock.now()  # it was us who stood still: the beats wait to be read

    # --------------------------------------------------------------------------------------------- sockets

    def _path(self, suffix: str) -> Path:
        return self._run_dir / f"{self._worker_id}.{suffix}"

    def _bind(self) -> tuple[str, str]:
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(os.fsencode(self._path("commands").absolute())) > MAX_IPC_PATH_BYTES:
            raise ConfigError(f"run_dir {self._run_dir} is too long for a Unix socket; choose a shorter one")
        self._context = zmq.asyncio.Context()
        endpoints = tuple(f"ipc://{self._path(name).absolute()}" for name in ("commands", "events"))
        self._commands = zmq.Socket(self._context, zmq.PUSH)
        self._events = self._context.socket(zmq.PULL)
        for socket, endpoint in zip((self._commands, self._events), endpoints, strict=True):
            socket.set_hwm(0)  # bounded by what the service has open, not by dropping or blocking
            socket.bind(endpoint)
        return endpoints[0], endpoints[1]
