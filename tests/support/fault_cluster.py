"""Two prefill and two decode workers behind a router, each source reached by its readers over a link that can fail.

    client -> router -> prefill-0, prefill-1            (directly)
                     -> decode-0, decode-1  -> link of prefill-0 -> prefill-0
                                            -> link of prefill-1 -> prefill-1

The router places in turn, so the pair that the next request gets is known: the one after the latest. Every engine
can be stopped at a named moment (`stopping_engine`). Leaving the block asserts that nothing is left.
"""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cluster import wait_until
from fault_links import HOST, FaultLinks, ProxyLinks
from fault_matrix import ClusterKind, Network
from fault_worker import FaultProcess
from namespace_links import NamespaceLinks
from process_memory import pool_mappings

from kvrelay_cli.ports import choose_ports
from kvrelay_client import AsyncClient, Finish

WORKERS_EACH = 2
LEAK_DEADLINE_S = 6.0  # a lost reader's pins are kept for 2 s, a lost session's requests too, one after the other
SETTLE_POLL_S = 0.05
SPARE_DESCRIPTORS = 12  # connections that gRPC has not closed yet, or has opened anew


class Pair(NamedTuple):
    """Indices of a prefill and a decode worker."""

    source: int
    reader: int

    @property
    def other(self) -> Pair:
        return Pair(1 - self.source, 1 - self.reader)


class FaultCluster:
    def __init__(
        self,
        model_dir: Path,
        kind: ClusterKind,
        flags: Mapping[str, int],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`flags` are those of all workers, `{"block_tokens": 16}` for `--block-tokens 16`, and so is `environment`.

        Skips the test where the machine has not what `kind` needs.
        """
        self._kind = kind
        self._model = ["--model", str(model_dir)]
        self._flags = ["--threads-per-worker", "1", "--digest-share", "1"]
        for name, value in flags.items():
            self._flags += [f"--{name.replace('_', '-')}", str(value)]
        self._environment = dict(environment or {})
        ports = choose_ports(HOST, 1 + 2 * WORKERS_EACH)
        self._links: FaultLinks
        if kind.network is Network.NAMESPACES:
            self._links = NamespaceLinks(WORKERS_EACH, kind.source)
        else:
            self._links = ProxyLinks(ports[1 : 1 + WORKERS_EACH])
        self._folder = Path(tempfile.mkdtemp(prefix="kvf-", dir="/tmp"))  # short: socket paths are
        self.prefill = [self._prefill(index, ports[1 + index]) for index in range(WORKERS_EACH)]
        self.decode = [self._decode(index, ports[1 + WORKERS_EACH + index]) for index in range(WORKERS_EACH)]
        self.router = self._router(ports[0])
        self._descriptors: dict[str, int] = {}
        self.latest: Pair | None = None  # that a request was placed on

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> FaultCluster:
        try:
            self._start()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for process in (self.router, *self.decode, *self.prefill):
                    process.terminate()
        finally:
            self._abandon()

    def _start(self) -> None:
        everybody = (self.router, *self.workers)
        for process in everybody:
            process.launch()
        for process in everybody:
            process.wait_ready()
        for role in ("prefill", "decode"):
            for worker in getattr(self, role):
                self.wait_registered(worker, 0)

    def _abandon(self) -> None:
        for process in (self.router, *self.workers):
            process.abandon()
        self._links.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self, worker: FaultProcess) -> None:
        """On the same port, after a kill. Returns when the router gives it requests again."""
        said = self.router.log_bytes
        worker.launch()
        worker.wait_ready()
        self.wait_registered(worker, said)
        self._descriptors.pop(worker.name, None)

    def wait_registered(self, worker: FaultProcess, since_bytes: int) -> None:
        wait_until(
            lambda: f"worker {worker.name} ({worker.address}) serves" in self.router.said(since_bytes),
            20,
            lambda: f"the router has {worker.name}\n{self.router.log()}",
        )

    # ---------------------------------------------------------------------------------------------- members

    @property
    def workers(self) -> list[FaultProcess]:
        return [*self.prefill, *self.decode]

    @property
    def connectors(self) -> tuple[str, str]:
        """Of decode-0 and decode-1."""
        return self._kind.readers

    @property
    def target(self) -> str:
        return self.router.address

    @property
    def next_pair(self) -> Pair:
        assert self.latest is not None, "ask something first"
        return self.latest.other

    def client(self) -> AsyncClient:
        return AsyncClient(self.target)

    def note(self, finish: Finish) -> None:
        """Where the router placed a request, as it says itself."""
        timing = finish.timing
        self.latest = Pair(int(timing.prefill_worker.rpartition("-")[2]), int(timing.decode_worker.rpartition("-")[2]))

    def readers_address(self, source: int) -> str:
        return self._links.readers_address(source)

    def hold_link(self, source: int) -> None:
        self._links.hold(source)

    def slow_link(self, source: int, bytes_per_s: float) -> None:
        self._links.slow(source, bytes_per_s)

    def swap_link(self, source: int) -> None:
        """Behind the address of this source there is the other one from now on: another start of an engine."""
        self._links.swap(source, self.prefill[1 - source].address)

    def mend_link(self, source: int) -> None:
        self._links.mend(source)

    def recover(self) -> None:
        """After a test that failed half-way, so that it does not take the others with it."""
        for source in range(WORKERS_EACH):
            self.mend_link(source)
        for worker in self.workers:
            worker.disarm_all()
            if worker.is_running:
                worker.send(signal.SIGCONT)
                worker.limit_files(resource.RLIM_INFINITY)
            else:
                self.restart(worker)
        self.latest = None

    # --------------------------------------------------------------------------------------------- after a test

    def assert_settled(self) -> None:
        """No worker that lives holds anything of any request, its books are right, no memory of a dead pool is
        mapped, and no descriptor leaks from test to test."""
        give_up_s = time.monotonic() + LEAK_DEADLINE_S
        alive = [worker for worker in self.workers if worker.is_running]
        with ThreadPoolExecutor(len(alive)) as pool:
            while left := [line for lines in pool.map(self._left_of, alive) for line in lines]:
                assert time.monotonic() < give_up_s, f"left after {LEAK_DEADLINE_S:g} s: {left}\n{self.logs()}"
                time.sleep(SETTLE_POLL_S)

    def _left_of(self, worker: FaultProcess) -> list[str]:
        left = worker.held()
        num_pools = len(pool_mappings(worker.engine_pid))
        num_alive = sum(source.is_running for source in self.prefill)
        if num_pools > 1 + num_alive:
            left.append(f"{worker.name}: maps {num_pools} pools, {num_alive} sources live")
        first = self._descriptors.setdefault(worker.name, worker.num_descriptors())
        if worker.num_descriptors() > first + SPARE_DESCRIPTORS:
            left.append(f"{worker.name}: {worker.num_descriptors()} descriptors, {first} at first")
        return left

    def logs(self) -> str:
        return "\n".join(process.log() for process in (self.router, *self.workers))

    # ------------------------------------------------------------------------------------------ command lines

    def _router(self, port: int) -> FaultProcess:
        words = ["router", *self._model, "--grpc-port", str(port), "--placement", "round_robin"]
        words += ["--prefill", ",".join(worker.address for worker in self.prefill)]
        words += ["--decode", ",".join(worker.address for worker in self.decode)]
        return FaultProcess(self._folder, "router", words, f"{HOST}:{port}")

    def _prefill(self, index: int, port: int) -> FaultProcess:
        words = ["--connector", self._kind.source, *self._links.listening(index, port)]
        environment = {**self._environment, **self._links.environment(index)}
        return FaultProcess(
            self._folder, f"prefill-{index}", self._words("prefill", index, words), self._links.address(index, port),
            prefix=self._links.prefix(index), environment=environment,
        )  # fmt: skip

    def _decode(self, index: int, port: int) -> FaultProcess:
        peers = ",".join(map(self._links.readers_address, range(WORKERS_EACH)))
        words = ["--connector", self._kind.readers[index], "--grpc-port", str(port), "--peers", peers]
        environment = {**self._environment, **self._links.environment(None)}
        return FaultProcess(
            self._folder, f"decode-{index}", self._words("decode", index, words), f"{HOST}:{port}",
            environment=environment,
        )  # fmt: skip

    def _words(self, role: str, index: int, words: list[str]) -> list[str]:
        name = f"{role}-{index}"
        return [role, *self._model, "--run-dir", str(self._folder / name), "--worker-id", name, *self._flags, *words]
