"""The links from the readers of a fault cluster to its sources, which a test cuts, slows and mends.

`ProxyLinks` go through a proxy each and hold bytes back; `namespace_links` has real networks that swallow packets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cuttable_proxy import CuttableProxy
from proxy_thread import ProxyThread

HOST = "127.0.0.1"


class FaultLinks(Protocol):
    """By the number of the source."""

    def listening(self, source: int, port: int) -> list[str]:
        """The flags of a source that is to be reached on `port`."""

    def address(self, source: int, port: int) -> str:
        """Where everybody but the readers reaches it: never cut."""

    def readers_address(self, source: int) -> str:
        """Where the readers reach it, over the link."""

    def prefix(self, source: int) -> Sequence[str]:
        """What its command begins with."""

    def environment(self, source: int | None) -> dict[str, str]:
        """Of a source, or of the readers."""

    def hold(self, source: int) -> None:
        """Nothing passes and nobody is told: either end takes the other for stopped."""

    def slow(self, source: int, bytes_per_s: float) -> None:
        """Each direction passes no more than this."""

    def swap(self, source: int, address: str) -> None:
        """Behind the link there is another process from now on; its connections are reset."""

    def mend(self, source: int) -> None: ...

    def close(self) -> None: ...


class ProxyLinks:
    def __init__(self, ports: Sequence[int]) -> None:
        """`ports` of the sources."""
        self._thread = ProxyThread()
        self._targets = [f"{HOST}:{port}" for port in ports]
        self._proxies: list[CuttableProxy] = [self._thread.open(target) for target in self._targets]

    def listening(self, source: int, port: int) -> list[str]:
        return ["--grpc-port", str(port), "--advertise", self.readers_address(source)]

    def address(self, source: int, port: int) -> str:
        return f"{HOST}:{port}"

    def readers_address(self, source: int) -> str:
        return self._proxies[source].address

    def prefix(self, source: int) -> Sequence[str]:
        return ()

    def environment(self, source: int | None) -> dict[str, str]:
        return {}

    def hold(self, source: int) -> None:
        self._thread.do(self._proxies[source].hold)

    def slow(self, source: int, bytes_per_s: float) -> None:
        self._thread.do(lambda: self._proxies[source].slow(bytes_per_s))

    def swap(self, source: int, address: str) -> None:
        self._thread.do(lambda: self._proxies[source].retarget(address))
        self._thread.do(self._proxies[source].cut)

    def mend(self, source: int) -> None:
        if self._proxies[source].target != self._targets[source]:
            self.swap(source, self._targets[source])
        self._thread.do(self._proxies[source].mend)

    def close(self) -> None:
        self._thread.close()
