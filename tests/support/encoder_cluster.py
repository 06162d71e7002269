"""Encoders, prefill workers and one decode worker behind a router, every engine of which can be stopped at a named
moment (`stopping_engine`) and every process killed, stopped and started again.

Leaving the block asserts that nothing is left.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from cluster import wait_until
from fault_worker import STOP_POLL_S, FaultProcess
from processes import state_of

from kvrelay_cli.ports import choose_ports

HOST = "127.0.0.1"
LEAK_DEADLINE_S = 6.0  # after a fault: a lost reader's pins are kept for 2 s, a lost session's requests too
CANCEL_DEADLINE_S = 2.0
STOP_DEADLINE_S = 20.0
SETTLE_POLL_S = 0.05


class EncoderCluster:
    def __init__(
        self,
        model_dir: Path,
        *,
        encoders: int = 2,
        prefill: int = 2,
        connector: str = "shm",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`connector` carries embeddings, and KV; `environment` is that of the encoders."""
        self.connector = connector
        self._model = ["--model", str(model_dir)]
        self._connector = ["--connector", connector]
        self._folder = Path(tempfile.mkdtemp(prefix="kve-", dir="/tmp"))  # short: socket paths are
        self._environment = dict(environment or {})
        ports = choose_ports(HOST, 2 + encoders + prefill)
        addresses = [f"{HOST}:{port}" for port in ports]
        sources, readers = addresses[2 : 2 + encoders], addresses[2 + encoders :]
        self.encoders = [
            self._worker("encoder", index, address, ["--embedding-mib", "1"]) for index, address in enumerate(sources)
        ]
        text = ["--block-tokens", "16", "--kv-blocks", "128", "--max-num-seqs", "8", "--max-batched-tokens", "24"]
        peers = ["--peers", ",".join(sources)]
        self.prefill = [
            self._worker("prefill", index, address, [*text, *peers]) for index, address in enumerate(readers)
        ]
        self.decode = self._worker("decode", 0, addresses[1], [*text, "--peers", ",".join(readers)])
        words = ["router", *self._model, "--grpc-port", str(ports[0]), "--encoder", ",".join(sources)]
        words += ["--prefill", ",".join(readers), "--decode", addresses[1]]
        self.router = FaultProcess(self._folder, "router", words, addresses[0])

    def _worker(self, role: str, index: int, address: str, words: list[str]) -> FaultProcess:
        name = f"{role}-{index}"
        words = [
            role,
            *self._model,
            *self._connector,
            "--run-dir",
            str(self._folder / name),
            "--worker-id",
            name,
            *words,
        ]
        words += ["--threads-per-worker", "1", "--grpc-port", address.rpartition(":")[2]]
        environment = self._environment if role == "encoder" else {}
        return FaultProcess(self._folder, name, words, address, environment=environment)

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> EncoderCluster:
        try:
            for process in (self.router, *self.workers):
                process.launch()
            for process in (self.router, *self.workers):
                process.wait_ready()
            for worker in self.workers:
                self._wait_registered(worker, 0)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for process in (self.router, self.decode, *self.prefill, *self.encoders):
                    process.terminate()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        for process in (self.router, *self.workers):
            process.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self, worker: FaultProcess) -> None:
        """On the same port. Returns when the router gives it requests again."""
        said = self.router.log_bytes
        worker.launch()
        worker.wait_ready()
        self._wait_registered(worker, said)

    def _wait_registered(self, worker: FaultProcess, since_bytes: int) -> None:
        wait_until(
            lambda: f"worker {worker.name} ({worker.address}) serves" in self.router.said(since_bytes),
            20,
            lambda: f"the router has {worker.name}\n{self.router.log()}",
        )

    def recover(self) -> None:
        """After a test, whatever it did, so that it does not take the others with it."""
        for worker in self.workers:
            worker.disarm_all()
            if worker.is_running:
                worker.send(signal.SIGCONT)
            else:
                self.restart(worker)

    # ---------------------------------------------------------------------------------------------- members

    @property
    def target(self) -> str:
        return self.router.address

    @property
    def workers(self) -> list[FaultProcess]:
        return [*self.encoders, *self.prefill, self.decode]

    def others(self, worker: FaultProcess) -> list[FaultProcess]:
        """Of its role."""
        role = self.encoders if worker in self.encoders else self.prefill
        return [one for one in role if one is not worker]

    def encoder_that_serves(self, address: str) -> FaultProcess:
        [found] = [encoder for encoder in self.encoders if encoder.address == address]
        return found

    # ------------------------------------------------------------------------------------- where they stop

    def arm(self, role: Iterable[FaultProcess], point: str) -> None:
        for worker in role:
            if worker.is_running:
                worker.arm(point)

    def wait_one_stopped(self, role: Iterable[FaultProcess], point: str) -> FaultProcess:
        """The first that has come to `point`; the others do not stop there any more."""
        pids = {worker.engine_pid: worker for worker in role if worker.is_running}
        give_up_s = time.monotonic() + STOP_DEADLINE_S
        while not (stopped := [worker for pid, worker in pids.items() if state_of(pid) == "T"]):
            assert time.monotonic() < give_up_s, f"nobody came to {point!r}\n{self.logs()}"
            time.sleep(STOP_POLL_S)
        for worker in pids.values():
            worker.disarm(point)
        return stopped[0]

    # --------------------------------------------------------------------------------------------- after a test

    def held(self) -> list[str]:
        alive = [worker for worker in self.workers if worker.is_running]
        with ThreadPoolExecutor(len(alive)) as pool:
            return [line for lines in pool.map(FaultProcess.held, alive) for line in lines]

    def assert_nothing_held(self, deadline_s: float = LEAK_DEADLINE_S) -> None:
        """By no worker that lives; each engine checks its own books as well."""
        give_up_s = time.monotonic() + deadline_s
        while held := self.held():
            assert time.monotonic() < give_up_s, f"still held after {deadline_s:g} s: {held}\n{self.logs()}"
            time.sleep(SETTLE_POLL_S)

    def logs(self) -> str:
        return "\n".join(process.log() for process in (self.router, *self.workers))
