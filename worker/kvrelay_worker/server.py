"""The life of a worker process: bind, start the engine, serve, drain, stop. What prefill and decode mains share.

    bind the port (health: alive, not serving) -> start the engine -> map its staging ring -> serving
    SIGTERM, SIGINT or the Drain RPC -> refuse new requests, let running ones end -> stop; a second signal stops now
    the engine dies or hangs -> every stream fails with WorkerLostError -> exit 1, for a supervisor to restart

Knows nothing of prefill or decode beyond the `Role` that they implement.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from pathlib import Path

from kvrelay.v1 import worker_pb2_grpc
from kvrelay_core.clock import Clock, MonotonicClock
from kvrelay_core.errors import ConfigError, DrainingError, KvRelayError
from kvrelay_core.rpc.server import RpcServer
from kvrelay_core.telemetry import start_telemetry
from kvrelay_worker.config import WorkerConfig
from kvrelay_worker.drain import Drain
from kvrelay_worker.engine_client import EngineClient
from kvrelay_worker.engine_link import EngineLink
from kvrelay_worker.service import WorkerServicer
from kvrelay_worker.staging import Staging
from kvrelay_worker.worker import Worker
from kvrelay_worker.worker_metrics import observe

log = logging.getLogger(__name__)

WORKER_SERVICE = "kvrelay.v1.WorkerService"
STOP_GRACE_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ExitCode(IntEnum):
    OK = 0
    LOST = 1  # the engine is gone: start the worker again
    CONFIG = 2  # starting it again would not help


class Role(ABC):
    """What prefill or decode adds to a worker's server."""

    service_names: tuple[str, ...]

    @abstractmethod
    def add_to(self, server: RpcServer) -> None:
        """Registers the servicers."""

    @abstractmethod
    def end_all(self, error: KvRelayError) -> None:
        """The worker ends: hands back what others can go on with, and ends every stream with the error."""

    @abstractmethod
    async def close(self) -> None:
        """Ends what the role holds beyond its tasks, which the worker ends."""


class WorkerServer:
    def __init__(self, config: WorkerConfig, build_role: Callable[[Worker], Role], engine: EngineLink, clock: Clock):
        self.worker = Worker(config, engine, clock)
        observe(self.worker)
        self._role = build_role(self.worker)
        self._drain = Drain(self.worker)
        self._names = (WORKER_SERVICE, *self._role.service_names)
        self._rpc = RpcServer(config.host, config.port, tls=config.tls, reflected=self._names)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(self.worker, self._drain), self._rpc.server)
        self._role.add_to(self._rpc)
        self._ended: asyncio.Future[ExitCode] = asyncio.get_running_loop().create_future()
        engine.on_loss(self._on_loss)

    async def start(self) -> str:
        """Returns the address at which other workers reach this one. Raises ConfigError, or the engine's error."""
        worker, config = self.worker, self.worker.config
        worker.address = config.address_for(await self._rpc.start())
        await self._set_serving(False)
        started = await worker.engine.start(partial(config.engine_config, worker.address), config.start_timeout_s)
        worker.staging = Staging.open(started)
        worker.tasks.spawn(self._run_drain(), "drain")
        await self._set_serving(True)
        return worker.address

    async def run(self) -> ExitCode:
        """Until a drain is over, the engine is lost or `stop_now`."""
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """Ends every stream, task and process. Idempotent."""
        name = self.worker.config.worker_id
        self._role.end_all(self.worker.engine.loss or DrainingError(f"worker {name} has ended; ask another one"))
        await self._rpc.stop(STOP_GRACE_S if self.worker.engine.loss is None else STOP_GRACE_S / 2)
        await self._role.close()
        await self.worker.close()
        await self.worker.engine.stop()
        if self.worker.staging is not None:
            self.worker.staging.close()
            self.worker.staging = None

    def on_signal(self) -> None:
        """The first one drains, the second one stops at once."""
        if self.worker.is_draining:
            self._end(ExitCode.OK)
        self.worker.request_drain(self.worker.config.drain_s)

    async def _run_drain(self) -> None:
        await self.worker.wait_drain_requested()
        await self._set_serving(False)
        left = await self._drain.run()
        if left:
            log.warning("the drain's deadline passed with %d requests running", left)
        self._end(ExitCode.OK)

    def _on_loss(self, error: KvRelayError) -> None:
        log.error("%s", error.message)
        self._end(ExitCode.LOST)

    def _end(self, code: ExitCode) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    async def _set_serving(self, serving: bool) -> None:
        for name in self._names:
            await self._rpc.set_serving(name, serving)


async def serve_worker(config: WorkerConfig, build_role: Callable[[Worker], Role]) -> int:
    """Runs a worker until it is told to stop or its engine is lost. Returns the process's exit code.

    Prints `ready grpc=HOST:PORT` on stdout once it serves; says on stderr why it could not.
    """
    clock = MonotonicClock()
    try:
        config.validate()
        stop_telemetry = start_telemetry(config.role, config.worker_id)
        _make_run_dir(Path(config.run_dir))
        engine = EngineClient(config.run_dir, config.worker_id, clock, hung_after_s=config.hung_after_s)
        server = WorkerServer(config, build_role, engine, clock)
    except ConfigError as error:
        return _complain(config, error)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, server.on_signal)
    starting = loop.create_task(server.start(), name="start")
    try:
        code = await _serve(server, starting)
    except KvRelayError as error:
        code = _complain(config, error)
    finally:
        starting.cancel()
        await asyncio.wait([starting])  # an engine that is just being spawned must not be missed
        await server.stop()
        await asyncio.to_thread(stop_telemetry)
        _remove_engine_files(config)
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    return code


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be made: {error}; choose another one", field="run_dir") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir {run_dir} is not writable for this user; choose another one", field="run_dir")


def _remove_engine_files(config: WorkerConfig) -> None:
    """What only a killed engine leaves; every other file in run_dir is the service's own."""
    Path(config.run_dir, f"{config.worker_id}.pool.sock").unlink(missing_ok=True)


async def _serve(server: WorkerServer, starting: asyncio.Task[str]) -> int:
    """A signal during the start ends it: there is nothing to drain yet."""
    stopping = asyncio.ensure_future(server.worker.wait_drain_requested())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return ExitCode.OK
        print(f"ready grpc={starting.result()}", flush=True)
        return await server.run()
    finally:
        stopping.cancel()


def _complain(config: WorkerConfig, error: KvRelayError) -> int:
    print(f"kvrelay serve {config.role} ({config.worker_id}): {error.message}", file=sys.stderr, flush=True)
    return ExitCode.CONFIG if isinstance(error, ConfigError) else ExitCode.LOST
