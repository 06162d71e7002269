"""A worker's real gRPC server on a loopback port, in front of a fake engine; nothing may be left when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from fake_engine import WAIT_S, FakeEngine

from kvrelay.v1 import common_pb2
from kvrelay_core.clock import ManualClock
from kvrelay_core.request import AttemptId
from kvrelay_core.rpc.channel import open_channel
from kvrelay_engine.config import EngineConfig
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms
from kvrelay_worker.config import WorkerConfig
from kvrelay_worker.server import Role, WorkerServer
from kvrelay_worker.worker import Worker

R = TypeVar("R", bound=Role)


def make_config(role: str, **changes: Any) -> WorkerConfig:
    engine = EngineConfig(
        role="prefill",
        model="model",
        worker_id="template",
        address="unset",
        commands_endpoint="ipc:///c",
        events_endpoint="ipc:///e",
        run_dir="/nowhere",
    )
    settings: dict[str, Any] = {
        "role": role,
        "worker_id": f"{role}-0",
        "engine": engine,
        "run_dir": "/nowhere",
        "session_grace_s": 0.05,
        "follow_grace_s": 0.3,
        **changes,
    }
    return WorkerConfig(**settings)


def make_ticket(engine: FakeEngine, address: str, num_blocks: int = 3, attempt: int = 1) -> KvTicket:
    assert isinstance(engine.layout, KvLayout)
    return KvTicket(
        ticket_id="t1",
        source_id="prefill-0",
        source_address=address,
        engine_epoch=engine.epoch,
        attempt=AttemptId("router", "request", attempt),
        model_fingerprint=b"model",
        layout=engine.layout,
        groups=(GroupBlocks(0, 0, tuple(range(1, num_blocks + 1)), tuple(range(101, 101 + num_blocks))),),
        num_tokens=num_blocks * engine.layout.block_tokens,
        unit_hashes=b"h" * 32 * num_blocks,
        lease=LeaseTerms(),
        mac=b"m" * 32,
    )


def make_generation(num_tokens: int = 4) -> common_pb2.Generation:
    return common_pb2.Generation(prompt_token_ids=range(1, num_tokens + 1), seed=7)


def make_attempt(attempt: int = 1, request_id: str = "request") -> common_pb2.AttemptId:
    return common_pb2.AttemptId(router_id="router", request_id=request_id, attempt=attempt)


@dataclass
class RiggedWorker(Generic[R]):
    server: WorkerServer
    role: R
    engine: FakeEngine
    clock: ManualClock
    address: str
    channel: grpc.aio.Channel

    @property
    def worker(self) -> Worker:
        return self.server.worker


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    """For what the event loop will bring about by itself; AssertionError when it does not within 5 s."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110  (what it waits for has no event)
                await asyncio.sleep(0.002)
    except TimeoutError as error:
        raise AssertionError(f"did not come true: {what}") from error


async def read_one(call: Any) -> Any:
    """The next message of a call; AssertionError when none comes within 5 s or the stream has ended."""
    async with asyncio.timeout(WAIT_S):
        message = await call.read()
    assert message is not grpc.aio.EOF, "the stream has ended"
    return message


@asynccontextmanager
async def running_worker(
    role_type: Callable[[Worker], R], engine: FakeEngine | None = None, **changes: Any
) -> AsyncIterator[RiggedWorker[R]]:
    """Asserts at the end that no request task, stream or staging slot is left, before anything is cancelled."""
    roles: list[R] = []

    def build(worker: Worker) -> R:
        roles.append(role_type(worker))
        return roles[0]

    engine = engine or FakeEngine()
    clock = ManualClock()
    named = getattr(role_type, "__name__", "")
    name = next((role for role in ("decode", "encoder") if role.capitalize() in named), "prefill")
    server = WorkerServer(make_config(name, **changes), build, engine, clock)
    address = await server.start()
    channel = open_channel(address, server.worker.config.tls)
    try:
        yield RiggedWorker(server, roles[0], engine, clock, address, channel)
        await channel.close()
        await wait_until(lambda: server.worker.streams.value == 0, "every stream has ended")
        await wait_until(lambda: len(server.worker.request_tasks) == 0, "every request task has ended")
        staging = server.worker.staging
        assert staging is None or staging.exports.num_taken == staging.imports.num_taken == 0
    finally:
        await channel.close()
        await server.stop()
    for owner in (server.worker.tasks, server.worker.request_tasks):
        assert (len(owner), owner.num_crashed) == (0, 0)
