"""EngineClient with real processes: a small program takes the engine's place and acts out one of its fates."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_engine import WAIT_S
from worker_rig import make_config, wait_until

from kvrelay_core.clock import ManualClock, MonotonicClock
from kvrelay_core.errors import ConfigError, DeadlineError, HandoffError, KvRelayError, WorkerLostError
from kvrelay_engine import messages
from kvrelay_engine.config import EngineConfig
from kvrelay_worker.engine_client import EngineClient

# Acts as its model is called. Speaks with the engine's own link.
PROGRAM = """
import atexit, sys, time
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import ConfigError
from kvrelay_engine.config import load_config
from kvrelay_engine.messages import *
from kvrelay_engine.service_link import ServiceLink
from kvrelay_transfer.layout import KvLayout

config = load_config(sys.argv[sys.argv.index("--config") + 1])
with ServiceLink(config.commands_endpoint, config.events_endpoint) as link:
    if config.model == "does not fit":
        # Frees what it had loaded, when its link is closed already.
        atexit.register(lambda: time.sleep(0.3))
        link.emit(StartFailed(info_of(ConfigError("3 GiB are missing"))))
        sys.exit(1)
    if config.model == "exits":
        sys.exit(7)
    if config.model == "never starts":
        link.receive(60)
        sys.exit(0)
    link.emit(Started(b"e" * 16, b"m", KvLayout("float32", 1, 1, 4, 8), 9, 64, 4, 16, 100, (), "cpu", 8, "", 0, 0))
    while True:
        for command in link.receive(0.02):
            if isinstance(command, Shutdown) and config.model != "stubborn":
                sys.exit(0)
            if isinstance(command, GetLoad):
                link.emit(LoadReply(command.call, Load(steps=5)))
        if config.model != "hangs":
            link.emit(Beat(Load(), {}))
"""


def config_of(model: str, run_dir: Path) -> Callable[[str, str], EngineConfig]:
    worker = make_config("prefill", run_dir=str(run_dir))

    def make(commands_endpoint: str, events_endpoint: str) -> EngineConfig:
        config = worker.engine_config("127.0.0.1:1", commands_endpoint, events_endpoint)
        return EngineConfig(**{**{name: getattr(config, name) for name in config.__struct_fields__}, "model": model})

    return make


@asynccontextmanager
async def client_in(
    run_dir: Path, hung_after_s: float = 30.0, silent_after_s: float = 10.0
) -> AsyncIterator[EngineClient]:
    program = run_dir / "program.py"
    program.write_text(PROGRAM)
    client = EngineClient(
        str(run_dir / "run"),
        "prefill-0",
        MonotonicClock(),
        hung_after_s=hung_after_s,
        silent_after_s=silent_after_s,
        command=(sys.executable, "-P", str(program)),
    )
    try:
        yield client
    finally:
        await client.stop()
    assert os.listdir(run_dir / "run") == []
    if client.process_id is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(client.process_id, 0)


async def test_commands_and_events_cross_and_stop_leaves_nothing(tmp_path: Path) -> None:
    async with client_in(tmp_path) as client:
        replies: asyncio.Queue[messages.LoadReply] = asyncio.Queue()
        client.on(messages.LoadReply, replies.put_nowait)
        started = await client.start(config_of("good", tmp_path / "run"), WAIT_S)
        assert started.num_blocks == client.started.num_blocks == 9
        client.send(messages.GetLoad(3))
        async with asyncio.timeout(WAIT_S):
            assert await replies.get() == messages.LoadReply(3, messages.Load(steps=5))
    assert client.loss is None


async def test_an_engine_copies_at_full_speed(tmp_path: Path) -> None:
    async with client_in(tmp_path) as client:
        await client.start(config_of("good", tmp_path / "run"), WAIT_S)
        with open(f"/proc/{client.process_id}/environ") as file:  # noqa: ASYNC230  (procfs does not wait)
            environment = file.read().split("\0")
    assert any(line.startswith("GLIBC_TUNABLES=") and "non_temporal_threshold" in line for line in environment)
    assert f"PATH={os.environ['PATH']}" in environment


async def test_what_a_killed_worker_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for suffix in ("engine.json", "commands", "events"):
        (tmp_path / "run" / f"prefill-0.{suffix}").touch()
    async with client_in(tmp_path) as client:
        await client.start(config_of("good", tmp_path / "run"), WAIT_S)


async def test_the_engines_own_error_ends_the_start_and_it_exits_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_in(tmp_path) as client:
        with pytest.raises(ConfigError, match="3 GiB are missing"):
            await client.start(config_of("does not fit", tmp_path / "run"), WAIT_S)
    assert client._process is not None and client._process.returncode == 1
    assert "killing it" not in caplog.text


async def test_an_exit_ends_the_start(tmp_path: Path) -> None:
    async with client_in(tmp_path) as client:
        with pytest.raises(WorkerLostError, match="code 7"):
            await client.start(config_of("exits", tmp_path / "run"), WAIT_S)


async def test_the_start_has_a_deadline(tmp_path: Path) -> None:
    async with client_in(tmp_path) as client:
        with pytest.raises(DeadlineError, match="start_timeout_s"):
            await client.start(config_of("never starts", tmp_path / "run"), 0.2)


async def test_a_killed_engine_is_lost_once_and_takes_no_commands(tmp_path: Path) -> None:
    async with client_in(tmp_path) as client:
        losses: list[KvRelayError] = []
        client.on_loss(losses.append)
        await client.start(config_of("good", tmp_path / "run"), WAIT_S)
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGKILL)
        await wait_until(lambda: bool(losses), "the loss is noticed")
        assert [type(error) for error in losses] == [WorkerLostError]
        with pytest.raises(WorkerLostError):
            client.send(messages.Drain())
        with pytest.raises(WorkerLostError):
            _ = client.started


async def test_an_engine_that_stops_beating_is_lost(tmp_path: Path) -> None:
    async with client_in(tmp_path, hung_after_s=0.2) as client:
        losses: list[KvRelayError] = []
        client.on_loss(losses.append)
        await client.start(config_of("hangs", tmp_path / "run"), WAIT_S)
        await wait_until(lambda: bool(losses), "the silence is noticed")
        assert "has not moved" in losses[0].message


async def test_an_engine_that_stands_still_for_a_while_is_silent_each_time_and_not_lost(tmp_path: Path) -> None:
    async with client_in(tmp_path, silent_after_s=0.3) as client:
        silences: list[KvRelayError] = []
        client.on_silence(silences.append)
        await client.start(config_of("good", tmp_path / "run"), WAIT_S)
        assert client.process_id is not None
        for times in (1, 2):
            os.kill(client.process_id, signal.SIGSTOP)
            await wait_until(lambda times=times: len(silences) == times, "the silence is noticed")  # type: ignore[misc]
            os.kill(client.process_id, signal.SIGCONT)
            beats: list[messages.Beat] = []
            client.on(messages.Beat, beats.append)
            await wait_until(lambda beats=beats: len(beats) > 20, "it beats again")  # type: ignore[misc]
        assert client.loss is None and len(silences) == 2
        assert isinstance(silences[0], HandoffError)


async def test_a_service_that_stood_still_itself_does_not_take_its_engine_for_silent(tmp_path: Path) -> None:
    async with client_in(tmp_path, silent_after_s=0.3) as client:
        silences: list[KvRelayError] = []
        client.on_silence(silences.append)
        await client.start(config_of("good", tmp_path / "run"), WAIT_S)
        time.sleep(1.0)  # noqa: ASYNC251  (the event loop stands still: that is the case)
        beats: list[messages.Beat] = []
        client.on(messages.Beat, beats.append)
        await wait_until(lambda: len(beats) > 20, "the beats that waited are read")
        assert silences == []


async def test_a_beating_engine_is_not_lost(tmp_path: Path) -> None:
    async with client_in(tmp_path, hung_after_s=0.5) as client:
        beats: list[messages.Beat] = []
        client.on(messages.Beat, beats.append)
        await client.start(config_of("good", tmp_path / "run"), WAIT_S)
        await wait_until(lambda: len(beats) > 40, "it beats for longer than the limit")
        assert client.loss is None


async def test_an_engine_that_does_not_obey_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay_worker.engine_client.EXIT_TIMEOUT_S", 0.1)
    async with client_in(tmp_path) as client:
        await client.start(config_of("stubborn", tmp_path / "run"), WAIT_S)


async def test_a_run_dir_too_long_for_a_socket_is_a_config_error(tmp_path: Path) -> None:
    client = EngineClient(str(tmp_path / ("x" * 100)), "prefill-0", ManualClock(), hung_after_s=1.0)
    with pytest.raises(ConfigError, match="too long"):
        await client.start(config_of("good", tmp_path), WAIT_S)
    await client.stop()
