"""A whole router in the test's process, over fake workers, with a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_encoder import FakeEncoder
from fake_worker import Call, DecodeCall, FakeDecode, FakePrefill, FakeWorker, token_of

from kvrelay_client import AsyncClient, Delta, Finish, GenerateStream
from kvrelay_router.config import RouterConfig
from kvrelay_router.main import RouterServer, load_checkpoint


@dataclass
class Relay:
    """One router with its fake workers, and a client of it."""

    checkpoint: Path
    prefill: list[FakePrefill]
    decode: list[FakeDecode]
    encoders: list[FakeEncoder]
    server: RouterServer
    client: AsyncClient
    address: str

    @property
    def workers(self) -> list[FakePrefill | FakeDecode | FakeEncoder]:
        return [*self.prefill, *self.decode, *self.encoders]

    async def settled(self) -> None:
        """Until nothing is open any more; the test's own time limit ends a wait in vain."""
        while self.server.registry.num_open or self.server.inference.num_calls:  # noqa: ASYNC110  # no event for it
            await asyncio.sleep(0.001)

    def assert_clean(self) -> None:
        assert self.server.registry.num_open == 0
        assert self.server.inference.num_calls == 0
        assert self.server.fleet.loads.total == self.server.fleet.encoders.loads.total == 0


class RelayMaker:
    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._made: list[Relay] = []

    async def __call__(self, num_prefill: int = 1, num_decode: int = 1, num_encoders: int = 0, **config: Any) -> Relay:
        prefill = [FakePrefill(f"prefill-{index}") for index in range(num_prefill)]
        decode = [FakeDecode(f"decode-{index}") for index in range(num_decode)]
        encoders = [FakeEncoder(f"encoder-{index}") for index in range(num_encoders)]
        starting: list[FakePrefill | FakeDecode | FakeEncoder] = [*prefill, *decode, *encoders]
        for worker in starting:
            await worker.start()
        return await self.connect(prefill, decode, encoders=encoders, **config)

    async def connect(
        self,
        prefill: list[FakePrefill],
        decode: list[FakeDecode],
        through: Mapping[str, str] | None = None,
        encoders: Sequence[FakeEncoder] = (),
        **config: Any,
    ) -> Relay:
        """Workers that are started already. `through`: address of a worker -> another one that leads there."""
        ways = through or {}
        defaults: dict[str, Any] = {
            "prefill": [ways.get(worker.address, worker.address) for worker in prefill],
            "decode": [ways.get(worker.address, worker.address) for worker in decode],
            "encoder": [encoder.address for encoder in encoders],
            "reattach_s": 0.5,
            "placement_wait_s": 1.0,
            "refused_wait_s": 0.3,
        }
        settings = RouterConfig(model=str(self._checkpoint), served_model_name="fake", **{**defaults, **config})
        settings.validate()
        server = RouterServer(settings, load_checkpoint(settings.model))
        address = await server.start()
        client = AsyncClient(address, tls=settings.tls)
        relay = Relay(self._checkpoint, prefill, decode, list(encoders), server, client, address)
        self._made.append(relay)
        async with asyncio.timeout(10):
            every = (*server.registry.sessions, *server.registry.encoders.values())
            await server.registry.wait_until(lambda: all(session.is_serving for session in every))
        return relay

    async def close(self) -> None:
        """Raises when something is left; everything is stopped all the same."""
        try:
            for relay in self._made:
                async with asyncio.timeout(5):
                    await relay.settled()
                relay.assert_clean()
        finally:
            for relay in self._made:
                await relay.client.close()
                await relay.server.stop()
                for worker in relay.workers:
                    await worker.stop()


def tokens(count: int, choice: int = 0) -> list[int]:
    """The first ones that fake workers generate."""
    return [token_of(choice, position) for position in range(count)]


async def next_delta(stream: GenerateStream) -> Delta:
    event = await anext(stream)
    assert isinstance(event, Delta)
    return event


async def rest_of(stream: GenerateStream) -> tuple[list[int], Finish]:
    """The tokens still to come and the end, of a stream with one choice."""
    ids: list[int] = []
    async for event in stream:
        if isinstance(event, Finish):
            return ids, event
        ids += event.token_ids
    raise AssertionError("no finish")


async def first_call(workers: Sequence[FakeWorker[Call]]) -> Call:
    """The next call of whichever worker gets one."""
    waiting = [asyncio.ensure_future(worker.next_call()) for worker in workers]
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return done.pop().result()


def worker_of(relay: Relay, call: DecodeCall) -> FakeDecode:
    return next(worker for worker in relay.decode if call in worker.calls.values())
