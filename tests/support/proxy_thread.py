"""Proxies that live as long as a cluster: on an event loop of their own, in a thread, while tests come and go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cuttable_proxy import CuttableProxy

T = TypeVar("T")

CALL_DEADLINE_S = 10.0


class ProxyThread:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies")
        self._thread.start()
        self._proxies: list[CuttableProxy] = []
        self._servers: list[asyncio.Server] = []

    def open(self, target: str) -> CuttableProxy:
        """Call its methods by `do` only."""
        return self._await(self._open(target))

    def do(self, action: Callable[[], object]) -> None:
        """On the proxies' own thread; returns when it is done."""

        async def act() -> None:
            action()

        self._await(act())

    def close(self) -> None:
        self._await(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self, target: str) -> CuttableProxy:
        proxy = CuttableProxy(target)
        server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
        proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._proxies.append(proxy)
        self._servers.append(server)
        return proxy

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for proxy in self._proxies:
            await proxy.close()
        for server in self._servers:
            await server.wait_closed()

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_DEADLINE_S)
