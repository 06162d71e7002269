"""Chooses TCP ports for roles, once: a restarted role comes back on its port.

Outside the range from which the kernel takes ports for outgoing connections, so that nobody can take a role's
port while it restarts.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from kvrelay_core.errors import UnavailableError

_LOWEST = 10_000
_ATTEMPTS = 2_000


def choose_ports(host: str, count: int) -> list[int]:
    """`count` different ports that are free on `host` now. Raises UnavailableError when there are too few."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(_ATTEMPTS):
            if len(sockets) == count:
                break
            taken = _bind(host, random.randrange(_LOWEST, _first_ephemeral_port()))
            if taken is not None:
                sockets.append(taken)
        if len(sockets) < count:
            raise UnavailableError(f"cannot find {count} free ports on {host}; is it an address of this machine?")
        return [int(taken.getsockname()[1]) for taken in sockets]
    finally:
        for taken in sockets:
            taken.close()


def _bind(host: str, port: int) -> socket.socket | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    candidate = socket.socket(family, socket.SOCK_STREAM)
    try:
        candidate.bind((host, port))
    except OSError:
        candidate.close()
        return None
    return candidate


def _first_ephemeral_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32_768
    return first if first > _LOWEST + 1_000 else 65_536
