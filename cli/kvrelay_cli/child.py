"""One child process with its output as lines. Knows nothing of roles.

Built on the protocol interface because `asyncio.subprocess.Process.wait()` of some Python releases returns only when
every holder of the child's pipes is gone, and a grandchild may hold them longer than the child lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence

from kvrelay_core.parent_death import parent_death_tie

STDOUT, STDERR = 1, 2
_LONGEST_LINE_BYTES = 2**20


class Child(asyncio.SubprocessProtocol):
    """Leads its own process group, and dies with this process. `take_line(fd, line)` gets every line."""

    def __init__(self, take_line: Callable[[int, str], None]) -> None:
        self._take_line = take_line
        self._partial = {STDOUT: b"", STDERR: b""}
        self._exited = asyncio.Event()
        self._closed = asyncio.Event()
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def start(cls, command: Sequence[str], take_line: Callable[[int, str], None]) -> Child:
        loop = asyncio.get_running_loop()
        _, child = await loop.subprocess_exec(
            lambda: cls(take_line),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
            # Its own group: Ctrl-C in the terminal reaches the supervisor alone, which stops roles in order.
            process_group=0,
            preexec_fn=parent_death_tie(os.getpid()),
        )
        return child

    async def wait(self) -> int:
        """The exit code, negative for a signal; every line was taken and nothing of its group lives."""
        await self._exited.wait()
        self.kill()
        await self._closed.wait()
        code = self._started().get_returncode()
        assert code is not None
        return code

    async def wait_exited(self) -> None:
        await self._exited.wait()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._started().send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._started().get_pid(), signal.SIGKILL)

    def close(self) -> None:
        """Kills what is left and gives the pipes back."""
        self.kill()
        self._started().close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._partial[fd] + data).split(b"\n")
        if len(rest) > _LONGEST_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._partial[fd] = rest
        for line in lines:
            self._take_line(fd, line.decode(errors="replace"))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        rest = self._partial.pop(fd, b"")
        if rest:
            self._take_line(fd, rest.decode(errors="replace"))

    def process_exited(self) -> None:
        self._exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

    def _started(self) -> asyncio.SubprocessTransport:
        assert self._transport is not None
        return self._transport
