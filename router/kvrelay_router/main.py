"""The router's process: start, serve, drain, stop.

read tokenizer and defaults -> bind -> connect to the workers -> ready when one of each listed role serves
SIGTERM or SIGINT -> refuse new requests, let running ones end -> stop; a second signal stops now
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import uuid
from collections.abc import Callable, Coroutine
from enum import IntEnum
from pathlib import Path
from typing import Any

from kvrelay.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from kvrelay_core.checkpoint import read_generation_defaults, resolve_model
from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError
from kvrelay_core.media.processor_config import read_processor_config
from kvrelay_core.rpc.server import RpcServer
from kvrelay_core.telemetry import start_telemetry
from kvrelay_router.auth import BearerAuth, read_api_keys
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet import Fleet
from kvrelay_router.inference import Checkpoint, InferenceServicer
from kvrelay_router.placement import make_placement
from kvrelay_router.registry import Registry
from kvrelay_router.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

INFERENCE_SERVICE = "kvrelay.v1.InferenceService"
_STOP_GRACE_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ExitCode(IntEnum):
    OK = 0
    CONFIG = 2  # starting again would not help


def load_checkpoint(model: str) -> Checkpoint:
    """Blocking, perhaps a download. Raises ConfigError."""
    folder = resolve_model(model, weights=False)
    return Checkpoint(load_tokenizer(folder), read_generation_defaults(folder), read_processor_config(folder))


class RouterServer:
    """`start()`, `drain()`, `stop()`: without signals and printing, for whoever embeds it."""

    def __init__(self, config: RouterConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        router_id = f"router-{uuid.uuid4().hex[:12]}"
        self.registry = Registry(
            router_id, config.prefill, config.decode, config.encoder, reattach_s=config.reattach_s, tls=config.tls
        )
        self.fleet = Fleet(self.registry, make_placement(config.placement))
        self.inference = InferenceServicer(config, checkpoint, router_id, self.fleet, MonotonicClock())
        keys = read_api_keys(Path(config.api_key_file)) if config.api_key_file else ()
        self._rpc = RpcServer(
            config.host,
            config.port,
            tls=config.tls,
            reflected=(INFERENCE_SERVICE,) if config.reflection else (),
            interceptors=(BearerAuth(keys),) if keys else (),
        )
        add_InferenceServiceServicer_to_server(self.inference, self._rpc.server)
        self._health: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Returns the address to call. Requests are UNAVAILABLE until a worker of each role serves."""
        port = await self._rpc.start()
        await self._rpc.set_serving(INFERENCE_SERVICE, False)
        self.registry.start()
        self._health = asyncio.get_running_loop().create_task(self._follow_readiness(), name="readiness")
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"{host}:{port}"

    async def wait_ready(self) -> None:
        await self.registry.wait_ready()

    async def drain(self) -> int:
        """Returns the number of requests that had to be abandoned."""
        await self._stop_following()
        await self._rpc.set_serving(INFERENCE_SERVICE, False)
        return await self.inference.drain(self._config.drain_s)

    async def stop(self) -> None:
        """Ends every stream and task. Idempotent."""
        await self._stop_following()
        await self._rpc.stop(_STOP_GRACE_S)
        await self.registry.close()

    async def _follow_readiness(self) -> None:
        while True:
            ready = self.registry.is_ready
            await self._rpc.set_serving(INFERENCE_SERVICE, ready)
            await self.registry.wait_until(lambda told=ready: self.registry.is_ready != told)  # type: ignore[misc]

    async def _stop_following(self) -> None:
        if self._health is not None:
            self._health.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health
            self._health = None


async def serve(config: RouterConfig) -> int:
    """Runs a router until SIGTERM or SIGINT. Returns the process's exit code.

    Prints `ready grpc=HOST:PORT` on stdout once it serves; says on stderr why it could not.
    """
    try:
        config.validate()
        stop_telemetry = start_telemetry("router", f"{config.host}:{config.port}")
        checkpoint = await asyncio.to_thread(load_checkpoint, config.model)
        server = RouterServer(config, checkpoint)
        code = await _serve(server, config)
        await asyncio.to_thread(stop_telemetry)
        return code
    except ConfigError as error:
        print(f"kvrelay serve router: {error.message}", file=sys.stderr, flush=True)
        return ExitCode.CONFIG


async def _serve(server: RouterServer, config: RouterConfig) -> int:
    first, second = asyncio.Event(), asyncio.Event()
    with _signals(lambda: second.set() if first.is_set() else first.set()):
        try:
            address = await server.start()
            if await _unless(first, server.wait_ready()):
                print(f"ready grpc={address}", flush=True)
                await first.wait()
                log.info("draining: %d requests in progress", server.inference.num_calls)
                await _unless(second, server.drain())
        finally:
            await server.stop()
    return ExitCode.OK


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Runs `work`; True when it ended before `event` was set, else it is cancelled."""
    loop = asyncio.get_running_loop()
    working, waiting = loop.create_task(work), loop.create_task(event.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
        return working.done()
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


@contextlib.contextmanager
def _signals(on_signal: Callable[[], None]) -> Any:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
