"""A TCP proxy on loopback whose connections a test can cut, hold up or slow down: a lost transport between two
processes that live on, one that stands still as if its other end were stopped, or a poor one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK_BYTES = 65536
SLOW_CHUNK_S = 0.02


class CuttableProxy:
    def __init__(self, target: str) -> None:
        self.target = target
        self._bytes_per_s: float | None = None
        self._delay_s = 0.0
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

    def slow(self, bytes_per_s: float) -> None:
        """Each direction of each connection passes no more than this."""
        self._bytes_per_s = bytes_per_s

    def delay(self, round_trip_s: float) -> None:
        """An answer comes so much later, however large it is."""
        self._delay_s = round_trip_s / 2

    def retarget(self, target: str) -> None:
        """New connections lead to another process from now on."""
        self.target = target

    def mend(self) -> None:
        """What was held passes, where its connection still stands; new connections are taken again; all at speed."""
        self._refuses = False
        self._bytes_per_s = None
        self._delay_s = 0.0
        self._flows.set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        self.num_accepted += 1
        host, _, port = self.target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:  # nobody listens there now
            writer.transport.abort()
            return
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

    @property
    def _chunk_bytes(self) -> int:
        """On a slow link small pieces, so that it trickles and does not stutter."""
        return CHUNK_BYTES if self._bytes_per_s is None else max(1, int(self._bytes_per_s * SLOW_CHUNK_S))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(self._chunk_bytes):
                await self._flows.wait()
                if self._bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self._bytes_per_s)
                if self._delay_s:
                    asyncio.get_running_loop().call_later(self._delay_s, sink.write, data)
                    continue
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
