"""Sources of a fault cluster in network namespaces of their own, reached by a wire that can be cut for real.

    readers, router, test   --- bridge ---------- data interface of namespace i      (is cut, slowed)
                            --- veth pair ------- control interface of namespace i   (never)

A cut swallows packets: both ends send to a hardware address that nobody has, as behind a dead port of a switch. No
interface goes down, no connection is reset and nobody is told. Needs root, iproute2 and a kernel with bridge and veth;
a slow wire a kernel with the tbf queue. Whoever lacks them has the test skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import pytest

# 198.18.0.0/15 is for benchmarks: nobody's own network. 32 addresses for each process of tests.
NUM_SLOTS = (1 << 17) // 32
NOBODY = "02:00:00:00:00:01"
BURST_BYTES = 32 << 10
QUEUE_MS = 400
COMMAND_DEADLINE_S = 10


class NamespaceLinks:
    def __init__(self, num_sources: int, connector: str) -> None:
        """Skips the test where the machine does not let us. `connector` is what has to keep to these networks."""
        self._connector = connector
        self._id = os.getpid() % NUM_SLOTS
        self._num_sources = num_sources
        self._ports: dict[int, int] = {}
        self._is_cut = [False] * num_sources
        try:
            self._set_up()
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            why = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"network namespaces need root, iproute2, bridge and veth: {why.strip()}")
        except BaseException:
            self.close()
            raise

    # -------------------------------------------------------------------------------------- of a source

    def listening(self, source: int, port: int) -> list[str]:
        self._ports[source] = port
        flags = ["--host", "0.0.0.0", "--allow-insecure", "--advertise", self.readers_address(source)]
        return ["--grpc-port", str(port), *flags]

    def address(self, source: int, port: int) -> str:
        return f"{self._ip(18 + 4 * source)}:{port}"

    def readers_address(self, source: int) -> str:
        return f"{self._ip(2 + source)}:{self._ports[source]}"

    def prefix(self, source: int) -> Sequence[str]:
        return ("nsenter", f"--net=/run/netns/{self._namespace(source)}", "--")

    def environment(self, source: int | None) -> dict[str, str]:
        if self._connector != "ucx":
            return {}
        device = self._bridge if source is None else self._data(source)
        return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": device, "UCX_TCP_BRIDGE_ENABLE": "y"}

    # --------------------------------------------------------------------------------------------- faults

    def hold(self, source: int) -> None:
        self._lead(source, NOBODY, NOBODY)

    def slow(self, source: int, bytes_per_s: float) -> None:
        limit = [
            "root",
            "tbf",
            "rate",
            f"{int(8 * bytes_per_s)}bit",
            "burst",
            f"{BURST_BYTES}",
            "latency",
            f"{QUEUE_MS}ms",
        ]
        try:
            for place in self._ends(source):
                _run("tc", *place, "qdisc", "replace", "dev", self._data(source), *limit)
        except (OSError, subprocess.CalledProcessError) as error:
            self.mend(source)
            pytest.skip(f"a slow wire needs tc and a kernel with the tbf queue: {getattr(error, 'stderr', error)}")

    def swap(self, source: int, address: str) -> None:
        raise AssertionError("a source in a namespace of its own cannot be swapped; no cell does it")

    def mend(self, source: int) -> None:
        self._lead(source, self._mac(source), self._bridge_mac)
        for place in self._ends(source):
            # Fails where there is none to delete.
            subprocess.run(["tc", *place, "qdisc", "del", "dev", self._data(source), "root"], capture_output=True)

    def close(self) -> None:
        """What is there of it; a namespace alone would go some time later only."""
        for source in range(self._num_sources):
            for name in (self._data(source), self._control(source)):
                subprocess.run(["ip", "link", "del", name], capture_output=True)
            subprocess.run(["ip", "netns", "del", self._namespace(source)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    # ------------------------------------------------------------------------------------------ internal

    def _set_up(self) -> None:
        _ip("link", "add", self._bridge, "address", self._bridge_mac, "type", "bridge")
        _ip("addr", "add", f"{self._ip(1)}/28", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for source in range(self._num_sources):
            self._add_source(source)

    def _add_source(self, source: int) -> None:
        namespace, data, control = self._namespace(source), self._data(source), self._control(source)
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        for name in (data, control):
            _ip("link", "add", name, "type", "veth", "peer", "name", name, "netns", namespace)
        _ip("link", "set", data, "master", self._bridge)
        _ip("-n", namespace, "link", "set", data, "address", self._mac(source))
        _ip("-n", namespace, "addr", "add", f"{self._ip(2 + source)}/28", "dev", data)
        _ip("-n", namespace, "addr", "add", f"{self._ip(18 + 4 * source)}/30", "dev", control)
        _ip("addr", "add", f"{self._ip(17 + 4 * source)}/30", "dev", control)
        for place in self._ends(source):
            for name in (data, control):
                _ip(*place, "link", "set", name, "up")
        self.mend(source)

    def _lead(self, source: int, to_source: str, to_readers: str) -> None:
        """Where packets of either direction go to."""
        _ip("neigh", "replace", self._ip(2 + source), "lladdr", to_source, "dev", self._bridge, "nud", "permanent")
        inside = ("-n", self._namespace(source))
        _ip(
            *inside,
            "neigh",
            "replace",
            self._ip(1),
            "lladdr",
            to_readers,
            "dev",
            self._data(source),
            "nud",
            "permanent",
        )

    def _ends(self, source: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The interfaces of a pair have one name: here, and inside."""
        return (), ("-n", self._namespace(source))

    @property
    def _bridge(self) -> str:
        return f"kvr{self._id}"

    @property
    def _bridge_mac(self) -> str:
        return "02:00:00:00:00:10"

    def _mac(self, source: int) -> str:
        return f"02:00:00:00:00:{0x20 + source:02x}"

    def _namespace(self, source: int) -> str:
        return f"kvrelay-{self._id}-{source}"

    def _data(self, source: int) -> str:
        return f"kvd{self._id}-{source}"

    def _control(self, source: int) -> str:
        return f"kvc{self._id}-{source}"

    def _ip(self, number: int) -> str:
        address = 32 * self._id + number
        return f"198.{18 + (address >> 16)}.{address >> 8 & 255}.{address & 255}"


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S)
