"""The life of a whole worker: the service's process with a real engine below it, from the ready line to exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import make_checkpoint
from processes import command_line, descendants, is_alive
from worker_rig import make_config

from kvrelay_worker.config import WorkerConfig

EXIT_TIMEOUT_S = 15.0
PROGRAM = """
import asyncio, sys, msgspec
from kvrelay_prefill.main import serve
from kvrelay_worker.config import WorkerConfig
sys.exit(asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=WorkerConfig))))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", num_layers=1)


class WorkerProcess:
    def __init__(self, config: WorkerConfig) -> None:
        arguments = [sys.executable, "-P", "-c", PROGRAM, msgspec.json.encode(config).decode()]
        environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def read_ready(self) -> str:
        """The address of the ready line; its end of the pipe closes when the worker ends before."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready grpc=127.0.0.1:"), f"{line!r}; {self.read_errors()}"
        return line.strip().removeprefix("ready grpc=")

    def read_errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    @property
    def engine_pids(self) -> list[int]:
        return [pid for pid in descendants(self.process.pid) if "kvrelay_engine.process" in command_line(pid)]

    @property
    def engine_pid(self) -> int:
        (pid,) = self.engine_pids
        return pid

    def wait_for_engine(self) -> None:
        """Until there is a process, which is long before it is ready."""
        wait_until(lambda: bool(self.engine_pids), "the engine is started")

    def exit_code(self) -> int:
        return self.process.wait(EXIT_TIMEOUT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def workers() -> Iterator[list[WorkerProcess]]:
    """To be appended to; ended after the test."""
    started: list[WorkerProcess] = []
    yield started
    for worker in started:
        worker.close()


def config_of(model: Path, run_dir: Path, **changes: Any) -> WorkerConfig:
    template = make_config("prefill").engine
    engine = msgspec.structs.replace(
        template, model=str(model), kv_blocks=8, block_tokens=16, hash_unit_tokens=16, max_num_seqs=4
    )
    return make_config("prefill", engine=engine, run_dir=str(run_dir), **changes)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + EXIT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"did not come true: {what}"
        time.sleep(0.01)


def test_a_killed_worker_is_started_anew_in_its_place_and_drains_at_sigterm(
    model: Path, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    config = config_of(model, tmp_path / "run")
    workers.append(WorkerProcess(config))
    workers[0].read_ready()
    engine_pid = workers[0].engine_pid
    workers[0].process.kill()
    wait_until(lambda: not is_alive(engine_pid), "the engine has died with its service")
    left = sorted(os.listdir(config.run_dir))
    assert left == [f"prefill-0.{name}" for name in ("commands", "engine.json", "events", "pool.sock")]
    workers.append(WorkerProcess(config))
    workers[1].read_ready()
    assert sorted(os.listdir(config.run_dir)) == left
    workers[1].process.send_signal(signal.SIGTERM)
    assert workers[1].exit_code() == 0
    assert os.listdir(config.run_dir) == []


def test_sigint_ends_the_start_and_a_lost_engine_is_an_error(
    model: Path, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """Two workers at once: a start takes seconds."""
    interrupted, orphaned = (config_of(model, tmp_path / name) for name in ("interrupted", "orphaned"))
    workers += [WorkerProcess(interrupted), WorkerProcess(orphaned)]
    workers[0].wait_for_engine()
    workers[0].process.send_signal(signal.SIGINT)
    assert workers[0].exit_code() == 0
    workers[1].read_ready()
    os.kill(workers[1].engine_pid, signal.SIGKILL)
    killed_s = time.monotonic()
    assert workers[1].exit_code() == 1
    assert time.monotonic() - killed_s < 5.0
    assert "exited with code -9" in workers[1].read_errors()
    for config in (interrupted, orphaned):
        assert os.listdir(config.run_dir) == []


def test_what_cannot_work_is_said_once_with_exit_code_2(
    model: Path, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    (tmp_path / "file").touch()
    cases = {
        "worker_id must be a name": config_of(model, tmp_path / "run", worker_id="a/b"),
        "--allow-insecure": config_of(model, tmp_path / "run", host="0.0.0.0", advertise="here:1"),
        "run_dir": config_of(model, tmp_path / "file" / "run"),
    }
    workers += map(WorkerProcess, cases.values())
    for worker, message in zip(workers, cases, strict=True):
        assert worker.exit_code() == 2
        errors = worker.read_errors()
        assert message in errors
        assert "Traceback" not in errors
