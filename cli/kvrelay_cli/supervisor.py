"""Runs the roles of one cluster: starts them all, says when they serve, stops them in order.

SIGTERM or SIGINT drains: the router first, so that nothing new arrives, then decode, then prefill, so that every
running hand-off finds its other side. A second signal kills. Knows nothing of models or requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kvrelay_cli.role_process import RoleProcess
from kvrelay_core.errors import UnavailableError

STOP_ORDER = ("router", "decode", "prefill")
# What a role may take beyond its drain time to close its engine.
STOP_MARGIN_S = 15.0


class Supervisor:
    def __init__(
        self,
        processes: Sequence[RoleProcess],
        announce: Callable[[], None],
        say: Callable[[str], None],
        *,
        start_timeout_s: float,
        drain_timeout_s: float,
    ) -> None:
        """`announce` is called once, when every role has served."""
        self._processes = processes
        self._announce = announce
        self._say = say
        self._start_timeout_s = start_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._stop_asked = asyncio.Event()
        self._kill_asked = asyncio.Event()

    async def run(self) -> None:
        """Returns after a signal, when no process is left. Raises what ended a role for good."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        runs = [asyncio.create_task(process.run(), name=process.spec.name) for process in self._processes]
        try:
            if await self._until(self._wait_all_ready(), runs):
                self._announce()
                await self._until(self._stop_asked.wait(), runs)
            await self._drain(runs)
        finally:
            await self._end(runs)

    def _on_signal(self) -> None:
        if self._stop_asked.is_set():
            self._say("second signal: killing every role")
            self._kill_asked.set()
        else:
            self._say("stopping; a second signal kills")
            self._stop_asked.set()

    async def _wait_all_ready(self) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                for process in self._processes:
                    await process.ready.wait()
        except TimeoutError:
            late = ", ".join(process.spec.name for process in self._processes if not process.ready.is_set())
            raise UnavailableError(
                f"{late} did not serve within {self._start_timeout_s:g} s; see what was said above, "
                "or raise --start-timeout"
            ) from None

    async def _until(self, goal: Coroutine[Any, Any, object], runs: Sequence[asyncio.Task[None]]) -> bool:
        """Whether the goal was reached before a stop was asked for; a role that ended for good raises."""
        goal_task = asyncio.create_task(goal)
        stop_task = asyncio.create_task(self._stop_asked.wait())
        try:
            done, _ = await asyncio.wait((goal_task, stop_task, *runs), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
            return goal_task in done
        finally:
            for task in (goal_task, stop_task):
                task.cancel()
            await asyncio.gather(goal_task, stop_task, return_exceptions=True)

    async def _drain(self, runs: Sequence[asyncio.Task[None]]) -> None:
        stop = asyncio.create_task(self._stop_in_order())
        kill = asyncio.create_task(self._kill_asked.wait())
        await asyncio.wait((stop, kill), return_when=asyncio.FIRST_COMPLETED)
        for task in (stop, kill):
            task.cancel()
        await asyncio.gather(stop, kill, return_exceptions=True)
        for process in self._processes:
            process.kill()
        await asyncio.gather(*runs)

    async def _stop_in_order(self) -> None:
        deadline_s = self._drain_timeout_s + STOP_MARGIN_S
        for role in STOP_ORDER:
            await asyncio.gather(*(p.stop(deadline_s) for p in self._processes if p.spec.role == role))

    async def _end(self, runs: Sequence[asyncio.Task[None]]) -> None:
        """Whatever happened: no process and no task is left."""
        for process in self._processes:
            process.kill()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*runs, return_exceptions=True)
