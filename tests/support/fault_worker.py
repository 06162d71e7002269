"""One process of a fault cluster: `kvrelay serve ROLE`, and what a test does to it: stop, go on, kill, start again."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from pathlib import Path

import grpc
from cluster import HELD, START_DEADLINE_S, STOP_DEADLINE_S, wait_until
from processes import command_line, descendants, is_alive, state_of

from kvrelay.v1 import worker_pb2 as pb
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub

STOP_POLL_S = 0.002
SHOWN_CHARS = 6000


class Part(Enum):
    """Which processes of a worker."""

    SERVICE = auto()
    ENGINE = auto()
    BOTH = auto()


class FaultProcess:
    """`words` follow `kvrelay serve`. Workers run with an engine that stops where it is told to."""

    def __init__(
        self,
        folder: Path,
        name: str,
        words: list[str],
        address: str,
        *,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`prefix` is what the command begins with; it has to become the process, not to start one."""
        self.name = name
        self.address = address
        self.run_dir = folder / name
        self._words = words
        self._prefix = prefix
        self._environment = environment or {}
        self._log_path, self._stdout_path = folder / f"{name}.log", folder / f"{name}.out"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_worker(self) -> bool:
        return self._words[0] != "router"

    # ------------------------------------------------------------------------------------------------ life

    def launch(self) -> None:
        program = [sys.executable, "-m", "kvrelay_cli", "serve"]
        if self.is_worker:
            program = [sys.executable, str(Path(__file__).with_name("stopping_worker.py"))]
        with self._log_path.open("a") as log, self._stdout_path.open("w") as stdout:
            self._process = subprocess.Popen(
                [*self._prefix, *program, *self._words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", **self._environment},
            )

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}\n{self.log()}"
            return self._stdout_path.read_text().endswith("\n")

        wait_until(is_ready, START_DEADLINE_S, lambda: f"{self.name} ready\n{self.log()}")

    def kill(self) -> None:
        """SIGKILL to the service, with which the kernel kills the engine. Returns when both are gone."""
        everybody = self.pids
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)
        wait_until(lambda: not any(map(is_alive, everybody)), 5, f"{self.name} gone")

    def terminate(self) -> None:
        """SIGTERM; asserts a clean end."""
        everybody = self.pids
        self.process.terminate()
        assert self.process.wait(STOP_DEADLINE_S) == 0, self.log()
        wait_until(lambda: not any(map(is_alive, everybody)), 1, f"every process of {self.name} gone")
        sockets = [path for path in self.run_dir.rglob("*") if path.is_socket()]
        assert not sockets, f"left by {self.name}: {sockets}"

    def abandon(self) -> None:
        """Whatever state it is in, nothing is left of it."""
        if self._process is not None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait(STOP_DEADLINE_S)

    # ------------------------------------------------------------------------------------------- processes

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was not launched"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pids(self) -> list[int]:
        """The service and, of a worker, its engine."""
        return [self.process.pid, *descendants(self.process.pid)]

    @property
    def engine_pid(self) -> int:
        [pid] = [pid for pid in self.pids[1:] if "--config" in command_line(pid)]
        return pid

    def send(self, number: signal.Signals, part: Part = Part.BOTH) -> None:
        match part:
            case Part.SERVICE:
                pids = [self.process.pid]
            case Part.ENGINE:
                pids = [self.engine_pid]
            case Part.BOTH:
                pids = self.pids
        for pid in pids:
            os.kill(pid, number)

    def limit_files(self, size_bytes: int) -> None:
        """No process of it can make a file, or memory that is a file, larger than this; restore with RLIM_INFINITY."""
        for pid in self.pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))

    # ------------------------------------------------------------------------------------- where it stops

    def arm(self, point: str, count: int = 1) -> None:
        """The engine stops at `point`, for the `count`-th time from now; `stall` holds reads up until `disarm`."""
        self._stop_file(point).write_text(str(count))

    def disarm(self, point: str) -> None:
        self._stop_file(point).unlink(missing_ok=True)

    def disarm_all(self) -> None:
        for path in (self.run_dir / "stops").iterdir():
            path.unlink(missing_ok=True)

    def wait_stopped(self, deadline_s: float) -> None:
        pid, give_up_s = self.engine_pid, time.monotonic() + deadline_s
        while state_of(pid) != "T":
            assert time.monotonic() < give_up_s, f"{self.name} did not get to where it was to stop\n{self.log()}"
            time.sleep(STOP_POLL_S)

    def _stop_file(self, point: str) -> Path:
        return self.run_dir / "stops" / point

    # -------------------------------------------------------------------------------------------- questions

    @property
    def log_bytes(self) -> int:
        return self._log_path.stat().st_size

    def said(self, offset: int) -> str:
        """On stderr, from there on."""
        with self._log_path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")

    def log(self) -> str:
        """The end of it, to be shown."""
        return f"--- {self.name}\n{self.said(0)[-SHOWN_CHARS:]}"

    def load(self) -> pb.WatchLoadResponse:
        """Its engine checks its own books for it."""
        with grpc.insecure_channel(self.address) as channel:
            [load] = WorkerServiceStub(channel).WatchLoad(pb.WatchLoadRequest(interval_s=0), timeout=10)
        return load

    def links(self, peer: str) -> list[pb.LinkReport]:
        """To one source, in the order in which they were opened."""
        return [link for link in self.load().links if link.peer == peer]

    def held(self) -> list[str]:
        load = self.load()
        return [f"{self.name}: {getattr(load, name)} {name}" for name in HELD if getattr(load, name)]

    def num_descriptors(self) -> int:
        """Of the service and its engine."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids)
