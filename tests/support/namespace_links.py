"""Sources of a fault cluster in network namespaces of their own, reached by a wire that can be cut for real.

    readers, router, test   --- data bridge ------ data interface of namespace i      (is cut, slowed)
                            --- control bridge --- control interface of namespace i   (never)

On this side only the bridges have addresses: UCX in other processes leaves bridges alone, and does not notice that they
go. A cut swallows packets: both ends send to a hardware address that nobody has, as behind a dead port of a switch. No
interface goes down, no connection is reset and nobody is told. Needs root, iproute2 and a kernel with bridge and
veth; a slow wire a kernel with the tbf queue. Whoever lacks them has the test skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import pytest

# 198.18.0.0/15 is for benchmarks: nobody's own network. 32 addresses for each process of tests.
NUM_SLOTS = (1 << 17) // 32
NOBODY, BRIDGE = "02:00:00:00:00:01", "02:00:00:00:00:10"
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
        self.close()  # of somebody who was killed and had our number
        try:
            self._make_namespaces()
            for source in range(num_sources):
                self._connect(source)
        except BaseException:
            self.close()
            raise

    # -------------------------------------------------------------------------------------- of a source

    def listening(self, source: int, port: int) -> list[str]:
        self._ports[source] = port
        flags = ["--host", "0.0.0.0", "--allow-insecure", "--advertise", self.readers_address(source)]
        return ["--grpc-port", str(port), *flags]

    def address(self, source: int, port: int) -> str:
        return f"{self._control_ip(source)}:{port}"

    def readers_address(self, source: int) -> str:
        return f"{self._data_ip(source)}:{self._ports[source]}"

    def prefix(self, source: int) -> Sequence[str]:
        return ("nsenter", f"--net=/run/netns/{self._namespace(source)}", "--")

    def environment(self, source: int | None) -> dict[str, str]:
        if self._connector != "ucx":
            return {}
        device = self._data_bridge if source is None else self._data(source)
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
            pytest.skip(f"a slow wire needs tc and a kernel with the tbf queue: {_why(error)}")

    def swap(self, source: int, address: str) -> None:
        raise AssertionError("a source in a namespace of its own cannot be swapped; no cell does it")

    def mend(self, source: int) -> None:
        self._lead(source, self._mac(source), BRIDGE)
        for place in self._ends(source):
            _run_anyhow("tc", *place, "qdisc", "del", "dev", self._data(source), "root")

    def close(self) -> None:
        """What is there of it; a namespace alone would go some time later only."""
        for source in range(self._num_sources):
            for name in (self._data(source), self._control(source)):
                _run_anyhow("ip", "link", "del", name)
            _run_anyhow("ip", "netns", "del", self._namespace(source))
        for bridge in (self._data_bridge, self._control_bridge):
            _run_anyhow("ip", "link", "del", bridge)

    # ------------------------------------------------------------------------------------------ internal

    def _make_namespaces(self) -> None:
        try:
            for source in range(self._num_sources):
                _ip("netns", "add", self._namespace(source))
            for bridge in (self._data_bridge, self._control_bridge):
                _ip("link", "add", bridge, "address", BRIDGE, "type", "bridge")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces and bridges need root, iproute2 and the kernel's leave: {_why(error)}")
        for bridge, address in ((self._data_bridge, self._ip(1)), (self._control_bridge, self._ip(17))):
            _ip("addr", "add", f"{address}/28", "dev", bridge)
            _ip("link", "set", bridge, "up")

    def _connect(self, source: int) -> None:
        namespace, data, control = self._namespace(source), self._data(source), self._control(source)
        _ip("-n", namespace, "link", "set", "lo", "up")
        for name, bridge in ((data, self._data_bridge), (control, self._control_bridge)):
            _ip("link", "add", name, "type", "veth", "peer", "name", name, "netns", namespace)
            _ip("link", "set", name, "master", bridge)
        _ip("-n", namespace, "link", "set", data, "address", self._mac(source))
        _ip("-n", namespace, "addr", "add", f"{self._data_ip(source)}/28", "dev", data)
        _ip("-n", namespace, "addr", "add", f"{self._control_ip(source)}/28", "dev", control)
        for place in self._ends(source):
            for name in (data, control):
                _ip(*place, "link", "set", name, "up")
        self.mend(source)

    def _lead(self, source: int, to_source: str, to_readers: str) -> None:
        """Where packets of either direction go to."""
        _set_neighbour((), self._data_ip(source), to_source, self._data_bridge)
        _set_neighbour(("-n", self._namespace(source)), self._ip(1), to_readers, self._data(source))

    def _ends(self, source: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The interfaces of a pair have one name: here, and inside."""
        return (), ("-n", self._namespace(source))

    @property
    def _data_bridge(self) -> str:
        return f"kvd{self._id}"

    @property
    def _control_bridge(self) -> str:
        return f"kvc{self._id}"

    def _data_ip(self, source: int) -> str:
        return self._ip(2 + source)

    def _control_ip(self, source: int) -> str:
        return self._ip(18 + source)

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


def _run_anyhow(*command: str) -> None:
    """Fails where there is nothing to undo."""
    with suppress(OSError, subprocess.CalledProcessError):
        _run(*command)


def _why(error: OSError | subprocess.CalledProcessError) -> str:
    return str(error.stderr).strip() if isinstance(error, subprocess.CalledProcessError) else str(error)


def _set_neighbour(place: tuple[str, ...], address: str, mac: str, device: str) -> None:
    _ip(*place, "neigh", "replace", address, "lladdr", mac, "dev", device, "nud", "permanent")
