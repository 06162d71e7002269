"""Hands the descriptor of a pool's segment to peers on this host, over a Unix socket in the run directory.

With it may go further descriptors, such as a pipe whose end tells the peer that the owner has died.

Only processes of the same user get it, on either side. One thread, which blocks in accept() and sends a few
bytes per peer and start; the socket file is all that a killed owner leaves, and its next start replaces it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

from kvrelay_core.errors import ConfigError, TransferError

GREETING = b"kvrelay-pool"
# sockaddr_un.sun_path holds 108 bytes with the final zero.
MAX_SOCKET_PATH_BYTES = 107
_PEER_TIMEOUT_S = 1.0
_UCRED = struct.Struct("3i")  # pid, uid, gid


class DescriptorServer:
    def __init__(self, path: Path, *fds: int) -> None:
        """Listens at `path`, replacing what a former start left there. `fds` stay the caller's."""
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(f"the socket path {path} is over {MAX_SOCKET_PATH_BYTES} bytes; use a shorter --run-dir")
        self.path = path
        self._fds = fds
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="pool-descriptor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        # Wakes the thread out of accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(_PEER_TIMEOUT_S)
                if peer_uid(peer) == os.geteuid():
                    socket.send_fds(peer, [GREETING], self._fds)


def fetch_descriptor(path: str) -> int:
    """A new descriptor of the segment that the process listening at `path` owns.

    Raises TransferError when nobody of this user gives one within a second.
    """
    [fd] = fetch_descriptors(path, 1)
    return fd


def fetch_descriptors(path: str, count: int) -> list[int]:
    """New descriptors of the segment and of `count - 1` more that its owner hands out. Raises TransferError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_PEER_TIMEOUT_S)
            connection.connect(path)
            if peer_uid(connection) != os.geteuid():
                raise TransferError(f"the owner of {path} is another user")
            greeting, fds, _, _ = socket.recv_fds(connection, len(GREETING), count)
    except OSError as error:
        raise TransferError(f"no KV pool can be mapped through {path}: {error}") from error
    if greeting != GREETING or len(fds) != count:
        for fd in fds:
            os.close(fd)
        raise TransferError(f"the process at {path} gave no pool; it may run as another user")
    return fds


def peer_uid(connection: socket.socket) -> int:
    """The user of the process at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(credentials)[1]
    return uid
