"""The supervisor against real processes that only pretend to be roles."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvrelay_cli.role_process import RoleProcess, RoleSpec
from kvrelay_cli.supervisor import Supervisor
from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import ConfigError, UnavailableError

# Says ready, notes its start and its end in a file, starts a child that would outlive it.
GOOD = """
import os, signal, subprocess, sys, time
name, log = sys.argv[1:]
def note(what):
    with open(log, "a") as file: file.write(f"{what} {name} {os.getpid()}\\n")
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def stop(*_):
    note("stop"); engine.kill(); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note("start")
with open(log, "a") as file: file.write(f"engine {name} {engine.pid}\\n")
print("ready grpc=127.0.0.1:1", flush=True)
signal.pause()
"""
DEAF = GOOD.replace('note("stop"); engine.kill(); sys.exit(0)', 'note("deaf")').replace(
    "signal.pause()", "time.sleep(600)"
)
MISCONFIGURED = 'import sys; print("kvrelay: no such model", file=sys.stderr); sys.exit(2)'
CRASHING = 'import sys; print("boom", file=sys.stderr); sys.exit(1)'


class Cast:
    """Builds roles from scripts and reads what they noted."""

    def __init__(self, tmp_path: Path) -> None:
        self.log = tmp_path / "log"
        self.log.touch()
        self.folder = tmp_path
        self.said: list[str] = []
        self.announced = asyncio.Event()

    def role(self, role: str, index: int, script: str = GOOD) -> RoleProcess:
        spec = RoleSpec(role, index, (sys.executable, "-c", script, f"{role}-{index}", str(self.log)))
        return RoleProcess(spec, lambda name: self.folder, self.said.append, ManualClock())

    def supervisor(self, *roles: RoleProcess, drain_timeout_s: float = 5) -> Supervisor:
        return Supervisor(
            roles, self.announced.set, self.said.append, start_timeout_s=30, drain_timeout_s=drain_timeout_s
        )

    def notes(self, what: str) -> list[tuple[str, int]]:
        return [(name, int(pid)) for name, pid in re.findall(rf"{what} (\S+) (\d+)", self.log.read_text())]

    def alive(self) -> list[int]:
        """A killed process that is just closing its files still counts."""
        return [pid for _, pid in self.notes("start") + self.notes("engine") if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], object], deadline_s: float = 20) -> None:
    """For what happens in other processes, which can only be looked at."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(supervisor.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_sigterm_stops_router_then_decode_then_prefill(tmp_path: Path) -> None:
    cast = Cast(tmp_path)
    roles = [cast.role("prefill", 0), cast.role("decode", 0), cast.role("router", 0)]
    async with running(cast.supervisor(*roles)) as task:
        await cast.announced.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 20)
    assert [name for name, _ in cast.notes("stop")] == ["router-0", "decode-0", "prefill-0"]
    await until(lambda: not cast.alive(), 1)


async def test_a_dead_role_is_started_again_with_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cast = Cast(tmp_path)
    async with running(cast.supervisor(cast.role("router", 0), cast.role("prefill", 0))) as task:
        await cast.announced.wait()
        victim = dict(cast.notes("start"))["prefill-0"]
        engine = dict(cast.notes("engine"))["prefill-0"]
        os.kill(victim, signal.SIGKILL)
        await until(lambda: "prefill-0 serves again" in cast.said)
        assert not is_alive(engine)
        assert "prefill-0 ended with signal SIGKILL; starting it again in 0.5 s" in cast.said
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(task, 20)
    await until(lambda: not cast.alive(), 1)


async def test_a_second_signal_kills(tmp_path: Path) -> None:
    cast = Cast(tmp_path)
    async with running(cast.supervisor(cast.role("router", 0, DEAF), drain_timeout_s=600)) as task:
        await cast.announced.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: cast.notes("deaf"))
        assert not task.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 20)
    await until(lambda: not cast.alive(), 1)


async def test_a_role_that_cannot_work_ends_the_cluster_with_its_message(tmp_path: Path) -> None:
    cast = Cast(tmp_path)
    supervisor = cast.supervisor(cast.role("router", 0), cast.role("prefill", 0, MISCONFIGURED))
    with pytest.raises(ConfigError, match="prefill-0 cannot start: no such model"):
        await asyncio.wait_for(supervisor.run(), 20)
    assert not cast.announced.is_set()
    await until(lambda: not cast.alive(), 1)


async def test_a_role_that_keeps_crashing_before_it_serves_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay_cli.backoff.FIRST_S", 0.01)
    cast = Cast(tmp_path)
    with pytest.raises(UnavailableError, match="4 times before it served: boom"):
        await asyncio.wait_for(cast.supervisor(cast.role("decode", 0, CRASHING)).run(), 30)


async def test_a_role_that_never_serves_ends_the_start(tmp_path: Path) -> None:
    cast = Cast(tmp_path)
    silent = cast.role("decode", 0, "import time; time.sleep(600)")
    supervisor = Supervisor([silent], cast.announced.set, cast.said.append, start_timeout_s=0.2, drain_timeout_s=0)
    with pytest.raises(UnavailableError, match=r"decode-0 did not serve within 0\.2 s"):
        await asyncio.wait_for(supervisor.run(), 20)


async def test_lines_of_a_role_are_prefixed_and_stdout_stays_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cast = Cast(tmp_path)
    talkative = GOOD.replace('print("ready', 'print("hello"); print("x" * 2_000_000); print("ready')
    async with running(cast.supervisor(cast.role("router", 0, talkative))) as task:
        await cast.announced.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 20)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "router-0 | hello\n" in captured.err


async def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    code = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from kvrelay_cli.role_process import RoleProcess, RoleSpec\n"
        "from kvrelay_core.clock import MonotonicClock\n"
        f"script = {GOOD!r}\n"
        "spec = RoleSpec('router', 0, (sys.executable, '-c', script, 'router-0', sys.argv[1]))\n"
        "asyncio.run(RoleProcess(spec, lambda name: Path('/'), print, MonotonicClock()).run())\n"
    )
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(log), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await until(lambda: "engine" in log.read_text())
        [(_, role)] = re.findall(r"start (\S+) (\d+)", log.read_text())
        [(_, engine)] = re.findall(r"engine (\S+) (\d+)", log.read_text())
        supervisor.kill()
        await until(lambda: not is_alive(int(role)))
    finally:
        if supervisor.returncode is None:
            supervisor.kill()
        await supervisor.wait()
    os.kill(int(engine), signal.SIGKILL)  # a real engine ties itself to its service; this stand-in does not
