"""A TCP proxy on loopback whose connections a test can cut or hold up: a lost transport between two processes that
live on, or one that stands still as if its other end were stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK_BYTES = 65536


class CuttableProxy:
    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refuses = False
        self._flows = asyncio.Event()
        self._flows.set()
        self.num_accepted = 0
        self.address = ""

    def cut(self, *, refuse: bool = False) -> None:
        """Resets every connection; with `refuse` it takes no new ones either."""
        self._refuses = refuse
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def hold(self) -> None:
        """Connections stay open and new ones are taken, but nothing passes: either end takes the other for stopped."""
        self._flows.clear()

    def mend(self) -> None:
        """What was held passes, where its connection still stands; new connections are taken again."""
        self._refuses = False
        self._flows.set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        self.num_accepted += 1
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.ensure_future(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self.mend()
        self.cut(refuse=True)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK_BYTES):
                await self._flows.wait()
                sink.write(data)
                await sink.drain()
            await self._flows.wait()
        except ConnectionError:
            pass  # cut
        finally:
            sink.transport.abort()


@asynccontextmanager
async def cuttable_proxy(target: str) -> AsyncIterator[CuttableProxy]:
    proxy = CuttableProxy(target)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()
