"""One supervised role: started, watched, started again with back-off when it dies, stopped when asked.

Knows what a role says of itself (its `ready` line on stdout and its exit code) and nothing of what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from kvrelay_cli.backoff import Backoff
from kvrelay_cli.child import STDOUT, Child
from kvrelay_core.clock import Clock
from kvrelay_core.errors import ConfigError, UnavailableError

READY_PREFIX = "ready "
EXIT_MUST_CHANGE = 2
# A role that has died this often before it ever served is given up.
MAX_FAILED_STARTS = 4
# What `serve` puts before a message: `kvrelay: `, or `kvrelay serve decode (decode-0): `.
_PROGRAM_PREFIX = re.compile(r"^kvrelay( serve \S+( \(\S+\))?)?: ")


class RoleSpec(Struct, frozen=True):
    """`command` is the argv of `kvrelay serve ROLE ...`; every start uses the same one."""

    role: str
    index: int
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


class RoleProcess:
    """`run()` lives until `stop()` is called or the role cannot work; `ready` is set once it has served."""

    def __init__(
        self,
        spec: RoleSpec,
        clean_role: Callable[[str], Path],
        say: Callable[[str], None],
        clock: Clock,
    ) -> None:
        """`clean_role` makes the role's folder anew before each start; `say` takes the supervisor's own lines."""
        self.spec = spec
        self.ready = asyncio.Event()
        self._clean_role = clean_role
        self._say = say
        self._clock = clock
        self._backoff = Backoff()
        self._child: Child | None = None
        self._stopping = asyncio.Event()
        self._ready_at_s: float | None = None
        self._last_words = ""

    async def run(self) -> None:
        """Raises ConfigError when the role says that its flags cannot work, UnavailableError when it keeps dying
        before it has ever served."""
        failed_starts = 0
        while not self._stopping.is_set():
            code = await self._run_once()
            if self._stopping.is_set():
                return
            died = f"{self.spec.name} ended with {_exit_text(code)}"
            if not self.ready.is_set():
                failed_starts += 1
                self._raise_if_hopeless(code, failed_starts, died)
            served_s = 0.0 if self._ready_at_s is None else self._clock.now() - self._ready_at_s
            delay_s = self._backoff.after_run(served_s)
            self._say(f"{died}; starting it again in {delay_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)

    async def stop(self, deadline_s: float) -> None:
        """SIGTERM, and SIGKILL to what is left of the role after `deadline_s`."""
        self._stopping.set()
        if self._child is None:
            return
        self._child.terminate()
        try:
            await asyncio.wait_for(self._child.wait_exited(), deadline_s)
        except TimeoutError:
            self._say(f"{self.spec.name} did not stop within {deadline_s:g} s; killing it")
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the role and to everything it started."""
        self._stopping.set()
        if self._child is not None:
            self._child.kill()

    async def _run_once(self) -> int:
        """One life of the process, from start to exit code; nothing of it is left afterwards."""
        self._clean_role(self.spec.name)
        self._ready_at_s = None
        self._last_words = ""
        self._child = child = await Child.start(self.spec.command, self._take_line)
        if self._stopping.is_set():  # asked for while it was being started
            child.kill()
        try:
            return await child.wait()
        finally:
            child.close()
            self._child = None

    def _take_line(self, fd: int, line: str) -> None:
        if fd == STDOUT and line.startswith(READY_PREFIX) and self._ready_at_s is None:
            self._ready_at_s = self._clock.now()
            if self.ready.is_set():
                self._say(f"{self.spec.name} serves again")
            self.ready.set()
            return
        # Its own message, when it had one, rather than what was logged on the way out.
        if line and (_PROGRAM_PREFIX.match(line) or not _PROGRAM_PREFIX.match(self._last_words)):
            self._last_words = line
        print(f"{self.spec.name} | {line}", file=sys.stderr, flush=True)

    def _raise_if_hopeless(self, code: int, failed_starts: int, died: str) -> None:
        reason = _PROGRAM_PREFIX.sub("", self._last_words) or "it said nothing; see --log-level"
        if code == EXIT_MUST_CHANGE:
            raise ConfigError(f"{self.spec.name} cannot start: {reason}")
        if failed_starts >= MAX_FAILED_STARTS:
            raise UnavailableError(f"{died}, {failed_starts} times before it served: {reason}")


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
