"""A whole cluster for a test: `kvrelay up` as a process, and everything a test asks of it.

    with Cluster(model_dir, decode=2, connector="grpc", block_tokens=16) as cluster:
        async with cluster.client() as client: ...
        cluster.assert_no_leaks()

Leaving the block stops it and asserts that no process and no file of it is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from processes import command_line, descendants, is_alive

from kvrelay.v1 import worker_pb2 as pb
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub
from kvrelay_client import AsyncClient
from kvrelay_core.rpc.channel import TlsFiles

START_DEADLINE_S = 90.0
STOP_DEADLINE_S = 30.0
# From the last cancel to the last free block, by the acceptance criteria.
LEAK_DEADLINE_S = 2.0
# Of a load: what an idle worker does not hold, and what there never is.
HELD = (
    "requests_waiting", "requests_waiting_remote_kv", "requests_running", "tokens_queued", "blocks_in_use",
    "blocks_pinned", "blocks_quarantined", "sliding_blocks", "embedding_blocks", "leases", "transfers", "streams",
    "tasks", "digests_wrong",
)  # fmt: skip


class Cluster:
    def __init__(
        self,
        model_dir: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        encoder: int = 0,
        tls: TlsFiles | None = None,
        **flags: str | int | float | Path,
    ) -> None:
        """`flags` are those of `kvrelay up`: `block_tokens=16` is `--block-tokens 16`."""
        self._tls = tls
        if tls is not None:
            flags |= {"tls_cert": tls.certificate, "tls_key": tls.key, "tls_ca": tls.ca}
        self.folder = Path(tempfile.mkdtemp(prefix="kvc-", dir="/tmp"))  # short: socket paths are
        self.num_workers = {"prefill": prefill, "decode": decode, "encoder": encoder}
        words = ["--model", str(model_dir)]
        for role, count in self.num_workers.items():
            words += [f"--{role}", str(count)]
        for name, value in {"threads_per_worker": 1, "kv_blocks": 256, "digest_share": 1, **flags}.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        self._command = [sys.executable, "-m", "kvrelay_cli", "up", *words]
        self._process: subprocess.Popen[bytes] | None = None
        self.target = ""

    # ------------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Returns when it serves."""
        (self.folder / "tmp").mkdir()
        with self.log_path.open("w") as log, self.stdout_path.open("w") as stdout:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.folder / "tmp"), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
            )
        self.target = self._wait_ready()

    def close(self) -> None:
        """Kills what is left, by process id, and removes the folder."""
        if self._process is not None:
            for pid in (*descendants(self._process.pid), self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait(STOP_DEADLINE_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.stop()
        except AssertionError:
            print(self.log())
            raise
        finally:
            if kind is not None:
                print(self.log())
            self.close()

    def stop(self) -> None:
        """SIGTERM; asserts a clean end: exit code 0, no process, no file."""
        everybody = [self._up.pid, *descendants(self._up.pid)]
        if self._up.poll() is None:
            self._up.send_signal(signal.SIGTERM)
        code = self._up.wait(STOP_DEADLINE_S)
        # A killed process that is just closing its files is still there for a moment.
        wait_until(lambda: not any(map(is_alive, everybody)), 1, lambda: f"no process: {self._left(everybody)}")
        files = [str(path) for path in (self.folder / "tmp").rglob("*")]
        assert not files, f"files left after SIGTERM: {files}"
        assert code == 0, f"up ended with {code}"

    @staticmethod
    def _left(everybody: list[int]) -> list[str]:
        return [f"{pid} {' '.join(command_line(pid))}" for pid in everybody if is_alive(pid)]

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    @property
    def stdout_path(self) -> Path:
        return self.folder / "stdout"

    def log(self) -> str:
        """The last lines of what the cluster said on stderr."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join([f"--- {self.log_path}", *lines[-200:]])

    def everything_said(self) -> str:
        """All of its log, and the command lines of all processes."""
        pids = (self._up.pid, *descendants(self._up.pid))
        return "\n".join([self.log_path.read_text(errors="replace"), *(" ".join(command_line(pid)) for pid in pids)])

    # ------------------------------------------------------------------------------------------- processes

    @property
    def up_pid(self) -> int:
        return self._up.pid

    def pid_of(self, role: str, index: int = 0) -> int:
        """Of the service process of `router`, or of one worker, such as `prefill`."""
        return self._service_pids(role, index)[0]

    def engine_pid_of(self, role: str, index: int = 0) -> int:
        [engine] = [
            pid for pid in descendants(self.pid_of(role, index)) if "kvrelay_engine.process" in command_line(pid)
        ]
        return engine

    def kill(self, role: str, index: int = 0, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to one service process and returns its id."""
        pid = self.pid_of(role, index)
        os.kill(pid, number)
        return pid

    def wait_restarted(self, role: str, index: int, old_pid: int, deadline_s: float = START_DEADLINE_S) -> None:
        """Until the role runs under a new process id and serves."""
        wait_until(lambda: self._service_pids(role, index) not in ([], [old_pid]), deadline_s, f"{role} restarted")
        if role != "router":
            wait_until(lambda: self._is_serving(role, index), deadline_s, f"{role} serving again")

    def address_of(self, role: str, index: int) -> str:
        words = command_line(self.pid_of(role, index))
        return f"{words[words.index('--host') + 1]}:{words[words.index('--grpc-port') + 1]}"

    # -------------------------------------------------------------------------------------------- questions

    def client(self, **options: Any) -> AsyncClient:
        return AsyncClient(self.target, **options)

    def describe(self, role: str, index: int = 0) -> pb.DescribeResponse:
        with self._channel(role, index) as channel:
            return WorkerServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)

    def loads(self) -> dict[str, pb.WatchLoadResponse]:
        """What every worker holds now, by its name such as `decode-0`; its engine checks its own books for it."""
        return {
            f"{role}-{index}": self.load_of(role, index)
            for role, count in self.num_workers.items()
            for index in range(count)
        }

    def load_of(self, role: str, index: int = 0, timeout_s: float = 10) -> pb.WatchLoadResponse:
        with self._channel(role, index) as channel:
            [load] = WorkerServiceStub(channel).WatchLoad(pb.WatchLoadRequest(interval_s=0), timeout=timeout_s)
        return load

    def held(self) -> list[str]:
        """Everything that an idle cluster would not hold, such as `decode-0: 3 blocks_in_use`."""
        return [
            f"{worker}: {getattr(load, name)} {name}"
            for worker, load in self.loads().items()
            for name in HELD
            if getattr(load, name)
        ]

    def assert_no_leaks(self, deadline_s: float = LEAK_DEADLINE_S) -> None:
        give_up_s = time.monotonic() + deadline_s
        while held := self.held():
            assert time.monotonic() < give_up_s, f"still held after {deadline_s:g} s: {held}\n{self.log()}"
            time.sleep(0.05)

    # --------------------------------------------------------------------------------------------- internals

    @property
    def _up(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "use the cluster as a context manager"
        return self._process

    def _channel(self, role: str, index: int) -> grpc.Channel:
        address = self.address_of(role, index)
        if self._tls is None:
            return grpc.insecure_channel(address)
        return grpc.secure_channel(address, self._tls.channel_credentials())

    def _wait_ready(self) -> str:
        def is_ready() -> bool:
            assert self._up.poll() is None, f"up ended with {self._up.returncode}\n{self.log()}"
            return self.stdout_path.read_text().endswith("\n")

        wait_until(is_ready, START_DEADLINE_S, lambda: f"the ready line\n{self.log()}")
        [line] = self.stdout_path.read_text().splitlines()
        assert line.startswith("ready grpc="), line
        return line.removeprefix("ready grpc=")

    def _service_pids(self, role: str, index: int) -> list[int]:
        found = []
        for pid in descendants(self._up.pid):
            words = command_line(pid)
            if "serve" in words and role in words and (role == "router" or f"{role}-{index}" in words):
                found.append(pid)
        return found[:1]

    def _is_serving(self, role: str, index: int) -> bool:
        try:
            self.describe(role, index)
        except (grpc.RpcError, ValueError, IndexError):  # not up yet, its command line not there yet, or not started
            return False
        return True


def wait_until(condition: Callable[[], object], deadline_s: float, what: str | Callable[[], str]) -> None:
    give_up_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > give_up_s:
            raise AssertionError(f"not within {deadline_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)
